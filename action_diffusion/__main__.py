"""`python -m action_diffusion` is the same as `action-diffusion`."""

from action_diffusion.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
