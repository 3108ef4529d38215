"""What of a model is spectral: parameters, computation, layers by what they do, and activations.

    from spectral_pod import SpectralAnalyzer, SpectralGPT

    analyzer = SpectralAnalyzer(SpectralGPT.from_checkpoint("DIR"))
    found = analyzer.analyze_architecture()
    print(f"{found['param_ratio']:.1%} of the parameters are spectral")

All figures are computed from the program and the parameters at hand. What counts as spectral is
defined where it is computed: of parameters and FLOPs in `analyzer_shares.py`, of layers in
`analyzer_verdict.py`, of filters and activations in `analyzer_bands.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod import models
from spectral_pod.analysis import analyzer_bands, hlo, hlo_cost
from spectral_pod.analysis.analyzer_bands import BANDS
from spectral_pod.analysis.analyzer_shares import shares
from spectral_pod.analysis.analyzer_verdict import MIN_POSITIONS, verdict
from spectral_pod.analysis.flops import defined
from spectral_pod.config import read_len
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.generate.restore import Trained
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.long_convolution import LongConvolution
from spectral_pod.layers.mixer import Mixer
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.shapes import PAD


class SpectralAnalyzer:
    """Analyses a model, trained or not; it changes nothing.

    Attributes:
      trained: the model, its parameters and their mesh, which is of one device.
    """

    def __init__(self, model: Any):
        """Takes a `SpectralModel`, `SpectralGPT` or `SpectralLLM`, or what they hold, a `Trained`.

        Raises:
          ConfigError: the model is none of these, or its mesh has several devices.
        """
        trained = getattr(model, "_trained", model)
        if not isinstance(trained, Trained):
            raise ConfigError(
                f"SpectralAnalyzer takes a model of spectral_pod, not {type(model).__name__}"
            )
        if trained.mesh.size > 1:
            raise ConfigError(
                f"SpectralAnalyzer takes a model on one device; its mesh has {trained.mesh.size}"
            )
        self.trained: Trained = trained

    def analyze_architecture(self) -> dict[str, Any]:
        """The shares of parameters and of FLOPs that are spectral.

        FLOPs are those of one forward pass over a training batch, with the defining form of each
        operation, whichever method computes it (`analysis/flops.py`).

        Returns:
          'param_ratio' and 'compute_ratio', in [0, 1], and 'components', by name the fields of
          `analyzer_shares.Share`.
        """
        trained = self.trained
        model = models.build(
            defined(trained.config),
            num_classes=trained.num_classes,
            vocab_size=trained.vocab_size,
            decoding=True,
        )
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            found = shares(functools.partial(_forward, model), *self._arguments())
        total = {
            name: sum(getattr(share, name) for share in found.values())
            for name in ("params", "spectral_params", "flops", "spectral_flops")
        }
        return {
            "param_ratio": total["spectral_params"] / total["params"],
            "compute_ratio": total["spectral_flops"] / total["flops"],
            **total,
            "components": {name: dataclasses.asdict(share) for name, share in found.items()},
        }

    def analyze_compiled(self) -> dict[str, Any]:
        """FLOPs of the same forward pass, as compiled for the device at hand.

        Here the operations have the methods of the run. One that computes a filter by products,
        as those for TPUs and kernels do, has no transforms in the compiled program.

        Returns:
          'flops', by opcode, and 'fft_ratio', the share of Fourier transforms.
        """
        with on_mesh(self.trained.mesh):
            forward = jax.jit(functools.partial(_forward, self.trained.module))
            compiled = forward.lower(*self._arguments()).compile()
        found = hlo_cost.flops_by_opcode(hlo.Program(compiled.as_text() or ""), rare=False)
        return {"flops": found, "fft_ratio": found.get("fft", 0.0) / sum(found.values())}

    def verify(self, seed: int = 0) -> dict[str, Any]:
        """Whether each mixer and channel mixer, and each long convolution within, is spectral.

        Returns:
          By the path of the layer, 'spectral', 'reasons' why it is not, and the fields of
          `analyzer_verdict.Verdict`.

        Raises:
          ConfigError: sequences are too short for probes.
        """
        config = self.trained.module.config
        length, width = config.max_positions, config.hidden_dim
        if length < MIN_POSITIONS:
            raise ConfigError(
                f"the layers of this model are of {length} positions; verification takes at least "
                f"{MIN_POSITIONS}: raise config.data.seq_len or config.model.context"
            )
        found = {}
        for name, mixer, params in self._mixers():
            layers: dict[str, tuple[nn.Module, Any]] = {name: (mixer, params)}
            layers |= {
                f"{name}/{inner}": (module, params[inner])
                for inner, module in _long_convolutions(mixer, params).items()
            }
            for path, (module, own) in layers.items():
                channels = module.width if isinstance(module, LongConvolution) else width
                with on_mesh(self.trained.mesh):
                    result = verdict(
                        functools.partial(_applied, module, own), length, channels, seed
                    )
                found[path] = {
                    "spectral": result.spectral,
                    "reasons": result.reasons,
                    **dataclasses.asdict(result),
                }
        return found

    def monitor(self, batch: Any) -> dict[str, Any]:
        """What the layers do with a batch, without dropout.

        Args:
          batch: int tokens [B, L], with `shapes.PAD` as padding; of a model that reads chunks, the
            first chunk counts.

        Returns:
          By mixer, such as 'layer_0/spectral':

          - 'input' and 'output': 'rms', the shares of the energy in the bands 'low', 'middle' and
            'high', that of the 'constant' part, and 'levels', the shares of the levels of a wavelet
            transform, from coarse to fine;
          - 'stream_share': the mean square of what the mixer adds, over that of the residual stream
            after the block;
          - what the layer shows of itself (`layers/probes.py`), such as 'energy_gate_mean',
            'memory_norm' or 'band_share': the mean, the smallest and the largest value;
          - 'level_weights' of wavelet attention: the mean over heads, from coarse to fine.

        Raises:
          DataError: the batch holds no such tokens.
        """
        trained, tokens = self.trained, np.asarray(batch)
        config = trained.module.config
        longest = trained.config.data.seq_len * config.documents
        multiple = config.stride * config.documents
        is_batch = tokens.ndim == 2 and tokens.dtype.kind in "iu" and tokens.size > 0
        if not is_batch or tokens.shape[1] > longest or tokens.shape[1] % multiple:
            raise DataError(
                f"batch is {tokens.dtype}{list(tokens.shape)}; it must be of integers [B, L], L a "
                f"multiple of {multiple} up to {longest}"
            )
        tokens_BL = jnp.asarray(tokens, jnp.int32)
        with on_mesh(trained.mesh):
            energies, probes = jax.device_get(
                analyzer_bands.observed(trained.module, trained.params, tokens_BL, tokens_BL != PAD)
            )
        found: dict[str, Any] = {}
        for path, _, _ in self._mixers():
            block, name = path.split("/")
            found[path] = {
                side: {key: float(x) for key, x in bands.items()} | {"levels": levels.tolist()}
                for side, (bands, levels) in energies[path].items()
            }
            shown = probes.get(block, {})
            added, stream = shown.get(f"{name}_rms"), shown.get("rms")
            if added is not None and stream:
                found[path]["stream_share"] = float(added / stream) ** 2
            found[path] |= _summaries(shown.get(name, {}))
            weights_SH = trained.params[block].get(name, {}).get("level_weight")
            if weights_SH is not None:
                found[path]["level_weights"] = np.mean(weights_SH, axis=1).tolist()
        return found

    def filters(self) -> analyzer_bands.Filters:
        """The learned filters, by the path of their module; see `learned_filters`."""
        module = self.trained.module
        config = module.config
        shape = 1, config.documents * config.max_positions * config.stride
        tokens_BL = jnp.zeros(shape, jnp.int32)
        with on_mesh(self.trained.mesh):
            return analyzer_bands.learned_filters(
                module, self.trained.params, tokens_BL, jnp.ones(shape, bool)
            )

    def _arguments(self) -> tuple[Any, ...]:
        """Abstract parameters, tokens and mask of a training batch, or of a chunk of its rows."""
        config = self.trained.config
        rows = config.train.global_batch_size, read_len(config)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.trained.params)
        return params, jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, bool)

    def _mixers(self) -> list[tuple[str, Mixer, Any]]:
        """The path, the module and the parameters of every mixer and channel mixer."""
        config = self.trained.module.config
        found = []
        for i in range(config.num_layers):
            params, names = self.trained.params[f"layer_{i}"], {}
            channel_mixer = CHANNEL_MIXERS[config.channel_mixer]
            for name in config.pattern[i % len(config.pattern)].split("+"):
                names[name] = MIXERS[name]
                if f"{name}_reverse" in params:
                    names[f"{name}_reverse"] = MIXERS[name]
                if channel_mixer.within_branch:
                    names[f"{name}_gate"] = channel_mixer
            if not channel_mixer.within_branch:
                names["feed_forward"] = channel_mixer
            for name, cls in names.items():
                module = cls.from_config(config, deterministic=True, name=name)
                found.append((f"layer_{i}/{name}", module, params.get(name, {})))
        return found


def _forward(model: Any, params: Any, tokens_BL: jax.Array, mask_BL: jax.Array) -> Any:
    return model.apply({"params": params}, tokens_BL, mask_BL)


@functools.partial(jax.jit, static_argnums=0)
def _applied(module: nn.Module, params: Any, x_BND: jax.Array) -> Any:
    """The output of a mixer, or of a long convolution, on sequences without padding."""
    mask = () if isinstance(module, LongConvolution) else (jnp.ones(x_BND.shape[:2], bool),)
    return module.apply({"params": params}, x_BND, *mask)


def _long_convolutions(mixer: Mixer, params: Any) -> dict[str, LongConvolution]:
    """The long convolutions that a mixer consists of, by name, as modules of their own."""
    found: dict[str, LongConvolution] = {}

    def keep(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, LongConvolution):
            found[context.module.path[-1]] = context.module.clone(parent=None, name=None)
        return next_function(*args, **kwargs)

    x_BND = jnp.zeros((1, mixer.max_positions, mixer.width))
    mask_BN = jnp.ones(x_BND.shape[:2], bool)
    with nn.intercept_methods(keep):
        jax.eval_shape(mixer.apply, {"params": params}, x_BND, mask_BN)
    return found


def _summaries(shown: Mapping[str, Any]) -> dict[str, Any]:
    """The probes of one mixer: a mean and bounds, by band or level where they have one."""
    found: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(shown):
        name = "/".join(key.key for key in path)
        x = np.asarray(x, np.float64)
        if name.endswith("response"):  # [channels, bands of equal width]
            power = np.array_split(np.square(x).mean(axis=0), len(BANDS))
            found[name] = {band: float(np.sqrt(p.mean())) for band, p in zip(BANDS, power)}
        elif name == "band_share":  # [bands, heads]
            found[name] = x.mean(axis=1).tolist()
        else:
            found[name] = {"mean": float(x.mean()), "min": float(x.min()), "max": float(x.max())}
    return found
