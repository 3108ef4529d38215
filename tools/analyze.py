"""How spectral a model is: its parameters, FLOPs, layers and, on data, activations and filters.

    python -m tools.analyze --workdir=DIR --json=FILE
    python -m tools.analyze --config=configs/lra_listops.py            # untrained
    python -m tools.analyze --workdir=DIR --monitor --remove_bands --plot=FILE.png

By component, the share of parameters and of FLOPs that are spectral; by layer, whether it acts as a
filter, found out with tones and shifts. --compiled adds the share of Fourier transforms in the
program as it is compiled for this device, by the methods that it selects.

--monitor adds what the layers do with the first batch of a split: bands of frequencies and wavelet
levels in and out of each mixer, gates and memories. --remove_bands evaluates the model on the whole
split without the low, middle or high third of the frequencies of its learned filters, or all three,
in all layers and in each alone. Both read the run's data.

The definitions are in spectral_pod/analysis/analyzer*.py. --json has `param_ratio`, `compute_ratio`
and `components`, and `layers`, `compiled`, `monitor` and `removed_bands`. --plot needs matplotlib.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spectral_pod import api
from spectral_pod.analysis import analyzer_bands, analyzer_plot
from spectral_pod.analysis.analyzer import SpectralAnalyzer
from spectral_pod.data import tasks
from spectral_pod.data.progress import Progress
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import NonNegative
from spectral_pod.generate.restore import Trained, restore_for_inference
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.train.evaluate import evaluate
from spectral_pod.train.sources import Sources, open_sources
from spectral_pod.train.step import eval_step
from spectral_pod.validation import validate

from . import shell

SPLITS = ("train", "validation", "test")
ALL, EVERY = "all layers", "all"  # layers, and bands


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("analyze", __doc__)
    parser.add_place("--workdir", help="the workdir of a run: a folder or a gs:// URL")
    parser.add_value("--step", NonNegative, None, "of the checkpoint (the newest sound one)")
    parser.add_config(required=False)
    parser.add_argument("--compiled", action="store_true", help="adds FLOPs as compiled here")
    parser.add_argument("--monitor", action="store_true", help="adds activations of a batch")
    parser.add_argument("--remove_bands", action="store_true", help="evaluates without bands")
    parser.add_argument(
        "--split", choices=SPLITS, help="of --monitor and --remove_bands (the run's)"
    )
    parser.add_output("--json", "write the figures to this file")
    parser.add_output("--plot", "draw them in this file, such as FILE.png or FILE.svg")
    return shell.run(parser, analyze, argv)


def analyze(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    if (arguments.workdir is None) == (arguments.config is None):
        raise ConfigError("give either --workdir=DIR or, for an untrained model, --config=FILE")
    if arguments.remove_bands and arguments.workdir is None:
        raise ConfigError("--remove_bands evaluates a trained model; give its --workdir")
    if arguments.plot:
        analyzer_plot.require_matplotlib()
    if arguments.workdir is not None:
        trained = restore_for_inference(arguments.workdir, step=arguments.step)
    else:
        trained = untrained(arguments.config)
    analyzer = SpectralAnalyzer(trained)
    report = analyzer.analyze_architecture()
    if arguments.compiled:
        report["compiled"] = analyzer.analyze_compiled()
    shell.say("probing the layers")
    report["layers"] = analyzer.verify()
    print(architecture_table(trained, report))
    if arguments.compiled:
        ratio, platform = report["compiled"]["fft_ratio"], jax.default_backend()
        print(f"as compiled for this {platform}, Fourier transforms are {ratio:.1%} of the FLOPs\n")
    print(verdict_table(report["layers"]))
    if arguments.monitor or arguments.remove_bands:
        split = arguments.split or trained.config.train.eval_split
        with contextlib.redirect_stdout(sys.stderr):
            sources = open_sources(trained.config)
        if trained.data_digest not in ("", sources.digest, *sources.former_digests):
            raise DataError(
                f"{arguments.workdir} was trained on other data (digest "
                f"{trained.data_digest[:12]}, this one has {sources.digest[:12]})"
            )
        if arguments.monitor:
            name, source = next(iter(sources.evaluation(split).items()))
            tokens = source.rows(0, np.arange(source.batch_size))["tokens"]
            mixers = analyzer.monitor(tokens)
            report["monitor"] = {"split": split, "source": name, "mixers": mixers}
            print(monitor_table(mixers))
        if arguments.remove_bands:
            report["removed_bands"] = removed_bands(trained, analyzer.filters(), sources, split)
            print(removed_table(report["removed_bands"]))
    if arguments.json:
        shell.write(arguments.json, json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        analyzer_plot.plot(report, analyzer.filters(), arguments.plot)


def untrained(config: Any) -> Trained:
    """The model of a configuration with the parameters that training starts with."""
    validate(config)
    classes = {cls.name: cls for cls in (api.SpectralModel, api.SpectralGPT, api.SpectralLLM)}
    cls: Any = classes[config.model.name]
    if cls is not api.SpectralModel:
        return cls(config)._trained
    task = tasks.make(config.data.task, config.data.options)
    return cls(config, num_classes=task.num_classes)._trained


def removed_bands(
    trained: Trained, filters: analyzer_bands.Filters, sources: Sources, split: str
) -> dict[str, Any]:
    """The accuracy and the loss on a split without bands of the learned filters.

    Returns:
      'split'; 'with_all' and 'loss_with_all', of the model itself; 'accuracy' and 'loss', by layer
      or ALL, and by band or EVERY.

    Raises:
      ConfigError: the model has no learned filters.
    """
    if not filters:
        raise ConfigError("--remove_bands: this model has no learned filters to remove bands from")
    objective, module = trained.objective, trained.module

    @jax.jit
    def step(params_and_filters: Any, batch: Any) -> Any:
        with analyzer_bands.with_filters(*params_and_filters) as params:
            return eval_step(params, batch, model=module, objective=objective)

    sets = sources.evaluation(split)
    data = trained.config.data
    layers = sorted({path.split("/")[0] for path in filters}, key=lambda name: int(name[6:]))
    cases = [(where, band) for where in (ALL, *layers) for band in (*analyzer_bands.BANDS, EVERY)]
    progress = Progress("Evaluating without bands", 1 + len(cases), "evaluations")

    def scores(changed: Mapping[str, Any]) -> tuple[float, float]:
        with on_mesh(trained.mesh):
            values = evaluate(
                step,
                (trained.params, {**filters, **changed}),
                sets,
                trained.mesh,
                threads=data.threads,
                prefetch=data.prefetch,
            )
        return float(values["accuracy"]), float(values["loss"])

    whole = scores({})
    found: dict[str, Any] = {"accuracy": {}, "loss": {}}
    for done, (where, band) in enumerate(cases, 1):
        progress.at(done)
        changed = {
            path: 0 * given if band == EVERY else analyzer_bands.without_band(given, band)
            for path, given in filters.items()
            if where in (ALL, path.split("/")[0])
        }
        for name, value in zip(("accuracy", "loss"), scores(changed)):
            found[name].setdefault(where, {})[band] = value
    progress.end()
    sources.wait_verified()
    return {"split": split, "with_all": whole[0], "loss_with_all": whole[1], **found}


# ---- What is printed


def architecture_table(trained: Trained, report: Mapping[str, Any]) -> str:
    state = f"step {trained.step}" if trained.step else "untrained"
    rows = [
        f"{trained.config.model.name}, {state}: spectral are {report['param_ratio']:.1%} of "
        f"{report['params']:,} parameters and {report['compute_ratio']:.1%} of "
        f"{report['flops']:.3g} FLOPs of a forward pass"
    ]
    width = max(map(len, report["components"]))
    rows.append(f"{'':{width}}  {'parameters':>12}  spectral  {'FLOPs':>10}  spectral")
    for name, share in report["components"].items():
        rows.append(
            f"{name:{width}}  {share['params']:>12,}  "
            f"{_percent(share['spectral_params'], share['params'])}  {share['flops']:>10.3g}  "
            f"{_percent(share['spectral_flops'], share['flops'])}"
        )
    return "\n".join(rows) + "\n"


def verdict_table(layers: Mapping[str, Any]) -> str:
    width = max(map(len, layers))
    rows = [f"{'':{width}}  spectral    kept   shift  interference  selectivity"]
    for name, found in layers.items():
        rows.append(
            f"{name:{width}}  {'yes' if found['spectral'] else 'no':>8}  {found['kept']:>6.1%}  "
            f"{found['shift_error']:>6.1%}  {found['interference']:>12.1%}  "
            f"{found['selectivity']:>11.2g}"
        )
    return "\n".join(rows) + "\n"


def monitor_table(mixers: Mapping[str, Any]) -> str:
    width = max(map(len, mixers))
    bands = "  ".join(f"{band:>6}" for band in analyzer_bands.BANDS)
    rows = [f"{'':{width}}  in: {bands}  out: {bands}  share of the stream"]
    for name, found in mixers.items():
        sides = [
            "  ".join(f"{found[side][band]:>6.1%}" for band in analyzer_bands.BANDS)
            for side in ("input", "output")
        ]
        share = f"{found['stream_share']:>8.2%}" if "stream_share" in found else ""
        rows.append(f"{name:{width}}      {sides[0]}       {sides[1]}  {share}")
        for key, value in found.items():
            if isinstance(value, dict) and "mean" in value:
                bounds = f"{value['mean']:.3g} ({value['min']:.3g} to {value['max']:.3g})"
                rows.append(f"{'':{width}}      {key} {bounds}")
            elif isinstance(value, list):
                shown = ", ".join(f"{x:.3g}" for x in value)
                rows.append(f"{'':{width}}      {key} {shown}, from coarse to fine")
            elif key.endswith("response"):
                shown = ", ".join(f"{band} {x:.3g}" for band, x in value.items())
                rows.append(f"{'':{width}}      {key} {shown}")
    return "\n".join(rows) + "\n"


def removed_table(removed: Mapping[str, Any]) -> str:
    width = max(map(len, removed["accuracy"]))
    bands = "  ".join(f"{band:>7}" for band in (*analyzer_bands.BANDS, EVERY))
    rows = [
        f"accuracy on {removed['split']}: {removed['with_all']:.2%}; without a band of the filters",
        f"{'':{width}}  {bands}",
    ]
    for where, of_band in removed["accuracy"].items():
        shown = "  ".join(f"{of_band[band]:>7.2%}" for band in (*analyzer_bands.BANDS, EVERY))
        rows.append(f"{where:{width}}  {shown}")
    return "\n".join(rows) + "\n"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:>8.1%}" if whole else f"{'-':>8}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
