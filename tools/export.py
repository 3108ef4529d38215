"""Writes a trained model to a folder that anyone can load, and puts it on the Hugging Face Hub.

    python -m tools.export --workdir=DIR --output=FOLDER --license=apache-2.0
    python -m tools.export --workdir=DIR --output=FOLDER --upload=USER/REPO

The folder has model.safetensors, config.json and a model card, README.md, to be completed by hand.
`SpectralGPT.from_export(FOLDER)` gives the same parameters, to the bit. The configuration is that
of the run, the paths of its data included.

--upload needs a login (`hf auth login`). It makes the repository if there is none: a private one.
"""

import json

import huggingface_hub
from absl import flags
from etils import epath

from spectral_pod.generate import export, hub
from spectral_pod.generate.restore import restore_for_inference
from tools import entry

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a run: a folder or a gs:// URL.")
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the newest sound one by default.")
_OUTPUT = flags.DEFINE_string("output", None, "A new or empty folder.")
_LICENSE = flags.DEFINE_string("license", None, "Of the parameters, such as apache-2.0.")
_UPLOAD = flags.DEFINE_string("upload", None, "Upload the folder to this repository, USER/REPO.")
flags.mark_flags_as_required(["workdir", "output"])


def main() -> None:
    workdir, output = _WORKDIR.value or "", _OUTPUT.value or ""
    api = huggingface_hub.HfApi()
    # What can fail without the model is tried before anything is written.
    export.refuse_if_used(output)
    if _UPLOAD.value:
        hub.check_access(api, _UPLOAD.value)
    trained = restore_for_inference(workdir, step=_STEP.value)
    file = epath.Path(workdir) / "result.json"
    result = json.loads(file.read_text()) if file.exists() else None
    export.save(trained, output, result=result, license=_LICENSE.value)
    entry.say(f"step {trained.step} of {workdir} is in {output}")
    if _UPLOAD.value:
        hub.upload(api, _UPLOAD.value, output)
        entry.say(f"uploaded to {api.endpoint}/{_UPLOAD.value}")


if __name__ == "__main__":
    entry.run(main)
