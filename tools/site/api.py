"""The pages of the Python interface; mkdocstrings reads the docstrings."""

import spectral_pod

_INTERFACES = {
    "Mixers": "spectral_pod.layers.mixer",
    "Tasks": "spectral_pod.data.tasks.task",
    "Fields": "spectral_pod.fields",
    "Tools of agents": "spectral_pod.agent.tools",
    "Sandbox": "spectral_pod.agent.sandbox",
}


def page() -> str:
    """What `from spectral_pod import ...` gives."""
    parts = ["# Python", "    from spectral_pod import " + ", ".join(spectral_pod.__all__)]
    for name in spectral_pod.__all__:
        module = getattr(spectral_pod, name).__module__
        parts.append(f"::: {module}.{name}\n    options:\n      heading_level: 2")
    return "\n\n".join(parts) + "\n"


def page_of_interfaces() -> str:
    """The modules that say how something of one's own is added."""
    parts = ["# Interfaces", "What a mixer, a task or a tool of your own provides."]
    for title, module in _INTERFACES.items():
        parts.append(f"## {title}\n\n::: {module}\n    options:\n      heading_level: 3")
    return "\n\n".join(parts) + "\n"
