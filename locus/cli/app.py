"""The subcommands, in the order of the walk."""

from __future__ import annotations

from cyclopts import App

from locus import __version__

app = App(
    name="locus",
    suppress_keyboard_interrupt=False,
    version=f"locus {__version__}",
    help="Find where a language model keeps the knowledge that must go, change only those weights, and prove it.",
    help_epilogue=(
        "MODEL is a checkpoint folder, a hub id (owner/name), or smollm2, which needs no hub. FACTS is a file "
        "(JSON, JSON lines, CSV, parquet or plain text; `locus facts FILE` shows how it is understood) or one of the "
        "shipped demo-forget, demo-retain. "
        "Start with: locus trace smollm2 demo-forget --limit 2 -o trace"
    ),
)

_COMMANDS = {
    "trace": "Causal tracing: which layers carry each fact.",
    "lens": "Logit lens and tuned lens: at which layer the target becomes readable, and who says it.",
    "locate": "Score neurons or weights and write a mask of those to edit; or compare several methods.",
    "combine": "Algebra of saved scores: average ranks, take retain from forget, normalize.",
    "edit": "Make the model forget, changing only the masked weights; writes a delta.",
    "export": "Write the edited checkpoint: base and delta to a folder any tool loads.",
    "revert": "Take a delta out of a checkpoint again, bit for bit.",
    "diff": "What differs between two checkpoints, on and off a mask.",
    "audit": "What was forgotten, what survived, what came back; with controls.",
    "compare": "Several audited edits side by side, with the Pareto front.",
    "run": "The whole walk from one TOML file, resumable stage by stage.",
    "known": "Which facts a model knows, before anything is traced.",
    "facts": "How a file of facts is understood; converts it to our own form.",
    "methods": "List the localizers, editors and attacks, or the options of one.",
    "models": "List the architectures whose parts have exact names.",
}

_MODULES = {"edit": "edit.command", "locate": "locate.command"}
"""Commands whose file stands in a folder of its own."""

for _order, (_name, _help) in enumerate(_COMMANDS.items()):
    app.command(f"locus.cli.{_MODULES.get(_name, _name)}:{_name}", name=_name, help=_help, sort_key=_order)
