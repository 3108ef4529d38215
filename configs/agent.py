"""A small SpectralGPT that calls the calculator: multi-digit arithmetic, by conversations.

    launch/local.sh --config=configs/agent.py --workdir=DIR
    python -m tools.agent --workdir=DIR --tools=calculator --task="what is 412 * 77?"

`:python` also writes code, for half of the questions that need a tool: about strings, lists and
dates. `:direct` is the first without the tool: every question is answered at once. The numbers of
validation are in ranges that training does not have, and so are the words and dates
(`spectral_pod/data/tasks/agent_kinds.py`). Accuracy is that of symbols; exact answers are what
`tools.agent_evaluate` counts (docs/results.md).

`:traces` trains such a model further, on files of traces (docs/agents.md):

    launch/local.sh --config=configs/agent.py:traces --workdir=NEW \\
        --config.train.start_from=DIR --config.data.options.train='traces/*.jsonl'
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config, default
from spectral_pod.recipes import learning_rates, schedule, small_conversations

SEQ_LEN = {"tool": 320, "python": 576, "direct": 96, "traces": 576}


def get_config(form: str = "tool") -> Config:
    if form not in SEQ_LEN:
        raise ValueError(f"unknown form {form!r}; there are {list(SEQ_LEN)}")
    c = default()
    c.data.task = "agent"
    c.data.options = ConfigDict()
    c.data.seq_len = SEQ_LEN[form]
    small_conversations(c)
    if form == "direct":
        c.data.options.tool = False
    if form == "python":
        c.data.options.python = 0.5
    if form == "traces":
        c.data.task = "agent_traces"
        c.train.eval_split = "validation"
        schedule(c, total=500, every=100, warmup=50)
        learning_rates(c, 3e-4)
    else:
        schedule(c, total=1200, every=300, warmup=200)
    return c
