"""The `action-diffusion` command."""


def main() -> int:
    return 0
