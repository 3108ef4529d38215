"""Writes a trained model to a folder that anyone can load, and uploads it to the Hugging Face Hub.

    python -m tools.export --workdir=DIR --output=FOLDER --license=apache-2.0
    python -m tools.export --workdir=DIR --output=FOLDER --watts=350
    python -m tools.export --workdir=DIR --output=FOLDER --upload=USER/REPO

The folder has model.safetensors, config.json and a model card, README.md. The card is written from
the records of the run: data, results, time and devices; what they do not say it calls unknown, and
intended uses are to be completed by hand. With --watts, the power of a device of the training, it
estimates energy as the time of the run times that power.

`SpectralGPT.from_export(FOLDER)` restores the same parameters, bit for bit. Of filters that use
some frequencies only (`config.optimizer.frequencies`) no others are written. The configuration is
that of the run, including the paths of its data.

--upload needs a login (`hf auth login`). It creates the repository, as a private one, if it does
not exist.
"""

import argparse
import re
import sys
from collections.abc import Sequence

import huggingface_hub

from spectral_pod import storage
from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, PositiveFloat
from spectral_pod.generate import export, hub, run_records
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.parallel import runtime

from . import shell


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("export", __doc__)
    parser.add_place(
        "--workdir", required=True, help="the workdir of a run: a folder or a gs:// URL"
    )
    parser.add_value("--step", NonNegative, None, "of the checkpoint (the newest sound one)")
    parser.add_place("--output", required=True, metavar="FOLDER", help="a new or empty one")
    parser.add_argument("--license", type=_license, help="of the parameters, such as apache-2.0")
    parser.add_value(
        "--watts", PositiveFloat, None, "the power of a device of the training (unknown)"
    )
    parser.add_argument("--upload", metavar="USER/REPO", help="uploads the folder there")
    return shell.run(parser, export_model, argv)


def export_model(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    workdir, output, repository = arguments.workdir, arguments.output, arguments.upload
    api = huggingface_hub.HfApi()
    # What can fail without the model is tried before anything is written.
    storage.check_access(output, write=True)
    export.refuse_if_used(output)
    if repository is not None and storage.is_remote(output):
        raise ConfigError(f"--upload takes files on disk; --output is {output}")
    if repository is not None:
        hub.check_access(api, repository)
    trained = restore_for_inference(workdir, step=arguments.step)
    records = run_records.read(workdir, trained.config, trained.data_digest)
    if records.no_stores:
        shell.say(f"The model card has no sizes of the data: {records.no_stores}")
    saved = export.save(
        trained, output, records=records, license=arguments.license, watts=arguments.watts
    )
    shell.say(f"step {trained.step} of {workdir} is in {output}")
    if saved:
        shell.say(f"without frequencies that its filters do not use, it is {saved:,} bytes smaller")
    if repository is not None:
        hub.upload(api, repository, output)
        shell.say(f"uploaded to {api.endpoint}/{repository}")


def _license(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", text):
        raise ConfigError(f"--license is {text!r}; it must be an identifier, such as apache-2.0")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
