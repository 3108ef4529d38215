"""A stand-in for the trainer, as a launcher of `tools.lra` and `tools.ablate`, and its results."""

import json

# Does what the first word of PLAN[CELL] says, and appends the cell's name to `started`.
TRAINER = """
import json, pathlib, signal, sys, time
home = pathlib.Path(__file__).parent
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
with open(home / "started", "a") as file:
    file.write(workdir.name + chr(10))
does, _, value = json.loads((home / "plan").read_text()).get(workdir.name, "done 50").partition(" ")
if does == "done":
    workdir.mkdir(exist_ok=True)
    (workdir / "result.json").write_text(json.dumps({
        "step": 7, "eval": {"split": "test", "accuracy": float(value) / 100}, "num_params": 1000,
        "bytes_per_second": 2000.0, "wall_seconds": 36.0,
    }))
if does == "fail":
    print("a line before", "ConfigError: it is broken", sep=chr(10), file=sys.stderr)
    sys.exit(int(value))
if does == "no_data":
    print("DataError: /files: there is no such file", file=sys.stderr)
    sys.exit(2)
if does == "wait":
    def end(*_):
        if value == "stubborn":
            return
        (home / "saved").write_text(workdir.name)
        sys.exit(75)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, lambda *_: (home / "interrupted").write_text(""))
    (home / "waits").write_text("")
    while True:
        time.sleep(0.05)
"""


def write_result(out, name, accuracy, memory, **more):
    """A finished run, whose memory is reported under several names, in GB."""
    (out / name).mkdir(parents=True)
    result = {"step": 700, "eval": {"split": "test", "accuracy": accuracy}} | more
    (out / name / "result.json").write_text(json.dumps(result))
    lines = [{"step": i} | values for i, values in enumerate(memory)]
    (out / name / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
