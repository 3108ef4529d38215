"""Changes of a configuration whose effects `tools.ablate` measures, by group and name.

A variant is a lever, or several joined by +, of which later ones override earlier ones.
"""

from collections.abc import Iterable, Mapping, Sequence

from spectral_pod import fields
from spectral_pod.errors import ConfigError

Fields = Mapping[str, str]  # the values of fields as flags have them

BASE = "base"  # the configuration as it is

LEVERS: dict[str, dict[str, Fields]] = {
    "patches": {
        "stride_1": {"model.patch.stride": "1"},
        "stride_2": {"model.patch.stride": "2"},
        "stride_4": {"model.patch.stride": "4"},
        "stride_8": {"model.patch.stride": "8"},
        "no_positions": {"model.patch.positions": "none"},
        "ngrams": {"model.patch.ngrams": "(3, 4, 5, 6)"},
        "scales": {"model.coarser_scales": "(4, 4)"},
        "scales_in_blocks": {"model.pattern": "('spectral+multi_scale',)"},
    },
    "filter": {
        "noise": {"model.spectral.initial": "noise"},
        "smooth": {"model.spectral.initial": "smooth"},
        "small": {"model.spectral.initial": "small"},
        "tau_half": {"model.spectral.tau_min": "0.5"},
        "tau_to_8": {"model.spectral.tau_max": "8.0"},
        "time_domain": {  # Fu et al. 2023, "Simple Hardware-Efficient Long Convolutions"
            "model.spectral.parametrization": "time",
            "model.spectral.kernel_dropout": "0.1",
            "model.spectral.kernel_threshold": "0.001",
        },
        "circular": {"model.spectral.padding": "circular"},
    },
    "frequencies": {
        "half_frequencies": {"optimizer.frequencies": "0.5"},
        "quarter_frequencies": {"optimizer.frequencies": "0.25"},
        "tenth_frequencies": {"optimizer.frequencies": "0.1"},
        "not_regrown": {
            "optimizer.frequencies": "0.25",
            "optimizer.selection_regrowth": "0.0",
        },
    },
    "gate": {
        "no_gate": {"model.spectral.energy_gate": "none"},
        "norm_gate": {"model.spectral.energy_gate": "norm"},  # the original design
        "open_gate": {"model.spectral.energy_bias": "3.0"},
    },
    "selectivity": {
        "fixed": {"model.pattern": "('spectral',)"},
        "selective": {"model.pattern": "('selective',)"},
        "selective_gate": {
            "model.pattern": "('selective',)",
            "model.selective.energy_gate": "rms",
        },
        "broadcast": {  # the original design
            "model.pattern": "('selective',)",
            "model.selective.form": "broadcast",
        },
    },
    "memory": {
        "no_memory": {"model.memory_interval": "0"},
        "memory_2": {"model.memory_interval": "2"},
        "memory_1": {"model.memory_interval": "1"},
        "heads_2": {"model.memory.num_heads": "2"},
        "heads_4": {"model.memory.num_heads": "4"},
        "gated_memory": {"model.memory.gated": "True"},
        "short_conv": {"model.memory.short_conv": "4"},
        "raw_keys": {"model.memory.normalize_keys": "False"},
        "narrow_beta": {  # the original design
            "model.memory.beta_min": "0.01",
            "model.memory.beta_max": "0.3",
        },
        "bidirectional": {"model.bidirectional": "True"},
    },
    "mixer": {
        "hybrid": {"model.pattern": "('spectral', 'spectral+attention')"},
        "local_hybrid": {"model.pattern": "('spectral+local_attention', 'spectral+delta')"},
        "attention": {"model.pattern": "('attention',)"},
        "fnet": {"model.pattern": "('fnet',)"},
        "s5": {"model.pattern": "('s5',)"},
        "hyena": {"model.pattern": "('hyena',)"},
        "hyena_1": {"model.pattern": "('hyena',)", "model.hyena.order": "1"},
        "hyena_3": {"model.pattern": "('hyena',)", "model.hyena.order": "3"},
        "wavelet": {"model.pattern": "('wavelet',)"},
        "delta": {"model.pattern": "('delta',)"},
    },
    "decay": {
        "fixed_decay": {"model.hyena.decay": "fixed"},
        "implicit": {"model.hyena.filter": "implicit"},
    },
    "block": {
        "post_norm": {"model.norm": "post"},
        "batch_norm": {"model.normalization": "batch"},
        "half_glu1": {"model.channel_mixer": "half_glu1"},
        "half_glu2": {"model.channel_mixer": "half_glu2"},
        "frequency": {"model.channel_mixer": "frequency"},
        "mean_pooling": {"model.pooling": "mean"},
    },
    "length": {f"length_{n}": {"data.seq_len": str(n)} for n in (2**i for i in range(10, 17))},
    "size": {
        "layers_2": {"model.num_layers": "2"},
        "layers_8": {"model.num_layers": "8"},
        "width_32": {"model.hidden_dim": "32"},
        "width_128": {"model.hidden_dim": "128"},
        "mlp_4": {"model.mlp_expansion": "4.0"},
    },
    "optimizer": {
        "rate_1e-3": {"optimizer.learning_rate": "1e-3"},
        "rate_3e-3": {"optimizer.learning_rate": "3e-3"},
        "dynamics_3e-3": {"optimizer.dynamics_learning_rate": "3e-3"},
        "no_decay": {"optimizer.weight_decay": "0.0"},
        "dropout": {"model.dropout": "0.1"},
        "average": {"optimizer.average": "0.999"},
    },
}


def fields_of(variant: str, own: Mapping[str, Fields], flag: str = "--variants") -> dict[str, str]:
    """The fields that a variant sets, with their values as flags have them.

    Args:
      own: levers of a command line, by name, which override those of LEVERS.
      flag: that names the variant, for messages.

    Raises:
      ConfigError: there is no such lever.
    """
    known: dict[str, Fields] = {BASE: {}}
    for group in LEVERS.values():
        known |= group
    known |= own
    found: dict[str, str] = {}
    for name in variant.split("+"):
        fields.one_of(f"{flag}: a lever", name, known)
        found |= known[name]
    return found


def of_groups(names: Iterable[str]) -> list[str]:
    """The base and all levers of some groups, each alone.

    Raises:
      ConfigError: there is no such group.
    """
    found = [BASE]
    for name in names:
        fields.one_of("--levers", name, LEVERS)
        found += LEVERS[name]
    return found


def parse(texts: Sequence[str]) -> dict[str, Fields]:
    """The levers of --lever=NAME:FIELD=VALUE; one with several fields is given several times.

    Raises:
      ConfigError: one is written otherwise, or its name cannot be that of a folder.
    """
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        name, colon, assignment = text.partition(":")
        field, equals, value = assignment.partition("=")
        if not (colon and equals and field):
            raise ConfigError(f"--lever={text}: write --lever=NAME:FIELD=VALUE")
        if not name.replace("_", "a").replace(".", "a").isalnum():
            raise ConfigError(f"--lever={text}: a name has letters, digits, _ and . only")
        found.setdefault(name, {})[field.removeprefix("config.")] = value
    return dict(found)
