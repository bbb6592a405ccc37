"""What a sensor says more often than an arm is commanded: a wrench at 500 Hz, where a policy acts at 10.

    samples [B, To · T, C], oldest first ─▶ causal convolutions, dilated by 1, 2, 4, … ─▶ of the last sample [B, F]

A sample's features are made of it and of those before it, as many as there are: how hard the tool pushes now, and
whether it has just touched something. WaveNet's layers (van den Oord et al. 2016), without its gates.
"""

from __future__ import annotations

from torch import Tensor, nn

from action_diffusion.errors import InputError

TAPS = 5


class Series(nn.Module):
    """channels: C, of a sample (a wrench has 6). n: values of an observation step, T · C, the channels fastest.
    n_obs_steps: To. hidden: channels in between. feature_dim: F.

    Raises `InputError` where n is no number of samples.
    """

    def __init__(self, *, n: int, n_obs_steps: int, channels: int, hidden: int = 32, feature_dim: int = 32):
        super().__init__()
        if n % channels:
            raise InputError(f"encoder.series: {n} values a step are no samples of {channels} channels")
        self.channels, self.output_dim = channels, feature_dim
        samples, seen, layers = n_obs_steps * n // channels, 1, list[nn.Module]()
        while seen < samples or not layers:
            dilation = 2 ** len(layers)
            layers.append(nn.Conv1d(hidden if layers else channels, hidden, TAPS, dilation=dilation))
            seen += (TAPS - 1) * dilation
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(hidden, feature_dim)

    def forward(self, values: Tensor) -> Tensor:
        """[B, To, T · C], normalised → [B, F]."""
        x = values.unflatten(2, (-1, self.channels)).flatten(1, 2).mT  # [B, C, To · T]
        for place, layer in enumerate(self.layers):
            before = (TAPS - 1) * 2**place
            y = nn.functional.silu(layer(nn.functional.pad(x, (before, 0))))
            x = x + y if x.shape == y.shape else y
        result: Tensor = self.out(x[..., -1])
        return result
