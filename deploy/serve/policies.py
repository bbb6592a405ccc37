"""The policy that a deployment asks for: a bundle on this machine, or one behind a policy server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from action_diffusion.deploy.serve.access import read_token
from action_diffusion.deploy.serve.client import RemotePolicy
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy, Serve
from action_diffusion.policy.inference import OPTIONS
from action_diffusion.policy.opening import load
from action_diffusion.policy.reading import read_spec
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy

if TYPE_CHECKING:
    from action_diffusion.policy.policy import DiffusionPolicy

DeployedPolicy: TypeAlias = "DiffusionPolicy | OnnxPolicy | RemotePolicy"


def open_policy(config: Deploy) -> DeployedPolicy:
    """What `configs/deploy.yaml` names by bundle=, by server=, or by both, which then have to be the same policy.

    Raises `InputError` for neither, for a bundle that cannot be loaded, and for a server that is not there.
    """
    bundle, server = config.bundle, config.server
    if server is None:
        if bundle is None:
            raise InputError("bundle is required: action-diffusion deploy bundle=…, or server=ws://HOST:PORT")
        return open_local(config, Path(bundle))
    spec = None if bundle is None else read_spec(Path(bundle))
    remote = RemotePolicy(str(server), token=read_token(config.token_file), timeout=config.server_timeout)
    if spec is not None and spec != remote.spec:
        remote.close()
        raise InputError(f"server={server} serves another policy than bundle={bundle}")
    return remote


def open_local(config: Deploy | Serve, bundle: Path, *, verify: bool = False) -> DiffusionPolicy | OnnxPolicy:
    """A bundle, or an ONNX file, as the configuration says how it is to compute; see `opening.load`."""
    policy = load(
        bundle,
        str(config.device),
        verify=verify,
        sampler=vars(config.sampler),
        extensions=config.extensions,
        given={"intents": vars(config.intents)},
        **{name: getattr(config, name) for name in OPTIONS},
    )
    return policy if isinstance(policy, OnnxPolicy) else policy.requires_grad_(False)


def open_copies(config: Serve, bundle: Path, *, verify: bool = False) -> list[DiffusionPolicy | OnnxPolicy]:
    """`open_local`, so often as it is to compute at once: a policy has memory that two computations would both use."""
    return [open_local(config, bundle, verify=verify and not i) for i in range(config.copies)]
