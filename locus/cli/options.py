"""Options that several commands share, and the options that a method's own fields become."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter

from locus.cli.renamed_options import current_options
from locus.errors import InputError

if TYPE_CHECKING:
    from locus.fact import Fact
    from locus.model import Model
    from locus.parallel.ranks import Ranks

S = TypeVar("S")

_MODEL = Group("Model", sort_key=10)
_RUN = Group("Run", sort_key=11)
_OUTPUT = Group("Output", sort_key=12)


def shown_default(value: Any) -> str | None:
    """A default as it would be typed; None, which shows none, for a flag that is not set and for nothing."""
    if value is None or value is False or value == ():
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


PLAIN = Parameter(negative_iterable=(), show_default=shown_default)
"""How options are shown: defaults as they would be typed, and no `--empty-` form of lists."""

MethodTokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
"""What is left of the command line for the chosen method's own options."""


@Parameter(name="*", group=_MODEL)
@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1; auto takes a GPU if there is one."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto is the checkpoint's own on a GPU and float32 on a CPU."""
    device_map: str | None = None
    """Spread the model over several devices (auto, balanced), through accelerate."""
    attn: str | None = None
    """Attention implementation of transformers: sdpa, eager, flash_attention_2."""
    bos: str = "auto"
    """Token put before every text: auto (the tokenizer's own), none, a token or its id."""
    chat: Annotated[bool, Parameter(negative="")] = False
    """Ask facts in conversation, as the tokenizer's chat template writes it; an answer ends with its end of turn."""
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False
    """Run modelling code that comes with the checkpoint."""

    def load(self, name: str, *, shard: bool = False, offload: bool = False) -> Model:
        """Load the model `name` this way; to be spread over the processes of a job if `shard`."""
        from locus.model import load_model

        return load_model(
            name,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            attn_implementation=self.attn,
            bos=self.bos,
            chat=self.chat,
            trust_remote_code=self.trust_remote_code,
            shard=shard,
            offload=offload,
        )

    def shape(self, name: str) -> Model:
        """The model `name` without its weights; dtype auto is float32 where it would be loaded on a CPU."""
        import torch

        from locus.model import load_shape

        on_cpu = self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available())
        on_cpu = on_cpu and self.device_map is None
        return load_shape(
            name,
            dtype="float32" if self.dtype == "auto" and on_cpu else self.dtype,
            attn_implementation=self.attn,
            bos=self.bos,
            chat=self.chat,
            trust_remote_code=self.trust_remote_code,
        )


@Parameter(name="*", group=_RUN)
@dataclass(frozen=True)
class Running:
    """How much is done, and from where it goes on."""

    limit: int | None = None
    """Only the first N facts."""
    seed: int = 0
    """Seed of everything random."""
    batch_tokens: int | None = None
    """Tokens a forward pass holds at most; the default is measured from free memory."""
    resume: Annotated[bool, Parameter(negative="")] = False
    """Go on with what an earlier, interrupted run of the same command left in the output folder."""

    @property
    def shared(self) -> dict[str, Any]:
        """The options that a method may have as fields of its own."""
        return {"seed": self.seed, "batch_tokens": self.batch_tokens}

    def facts(self, path: str) -> list[Fact]:
        """The first `limit` facts of a file."""
        from locus.fact import read_facts

        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit}: give 1 or more")
        return read_facts(path, limit=self.limit)


@Parameter(name="*", group=_OUTPUT)
@dataclass(frozen=True)
class Talking:
    """What is said while and after."""

    json: Annotated[bool, Parameter(negative="")] = False
    """Print one JSON object on stdout; everything else goes to stderr."""
    quiet: Annotated[bool, Parameter(negative="", name=["--quiet", "-q"])] = False
    """No progress and no summary."""
    debug: Annotated[bool, Parameter(negative="")] = False
    """Show the traceback of an error."""

    def of(self, ranks: Ranks) -> Talking:
        """The same for one process of a job: only the first of them speaks."""
        return self if ranks.first else Talking(quiet=True, debug=self.debug)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show progress on stderr, unless quiet."""
        from locus import progress

        if self.quiet:
            yield
        else:
            with progress.show():
                yield

    def note(self, text: str) -> None:
        """Say something on the way, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def finish(self, result: dict[str, Any], summary: str | Any) -> None:
        """End a command: the JSON object if it was asked for, else a summary for a person (text or a rich table)."""
        if self.json:
            print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        elif not self.quiet:
            from rich.console import Console

            Console(highlight=False, soft_wrap=True).print(summary)


def tokens_of(table: Mapping[str, Any], flags: Sequence[str] = ()) -> list[str]:
    """A table of options, as in a TOML file, as the command line would say it.

    Args:
        table: Name of an option (with _ or -) -> its value.
        flags: Options that have no `--no-` form: false leaves them out.
    """
    tokens: list[str] = []
    for name, value in table.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            if value or name.replace("-", "_") not in flags:
                tokens.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            tokens += [flag, *map(str, value)]
        else:
            tokens += [flag, str(value)]
    return tokens


def option_names(cls: type[Any]) -> list[str]:
    """The options that a method's fields become, with _ for -."""
    return [_flag(path) for path, *_ in _leaves(cls(), ())]


def method_class(table: dict[str, type[S]], name: str, kind: str) -> type[S]:
    """The entry `name` of a table of methods.

    Raises:
        InputError: there is none; the message names the nearest and says how to list them all.
    """
    import difflib

    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"--method {name}: no such {kind}; {guess}`locus methods` lists them: {', '.join(sorted(table))}"
    )


def method_app(command: str, cls: type[S], shared: Mapping[str, Any] = MappingProxyType({})) -> App:
    """A parser of a method's own options: the fields of its dataclass, those of nested ones among them.

    A field of the nested `training` is called by its own name (`--lr`); those of any other nested dataclass
    have the field's name in front (`--retain-weight`). Fields named in `shared` are options of the command
    itself (`--seed`): they get that value, unless it is None, and are no options here. A nested field of the same
    name (`--reinforce-seed`) stays an option, and has the command's value where it is not given.
    """
    app = App(
        name=command,
        version_flags=(),
        help_flags=(),
        help=inspect.cleandoc(cls.__doc__ or ""),
        default_parameter=PLAIN,
    )
    settled = {name: value for name, value in shared.items() if value is not None}
    leaves = [
        (path, hint, settled.get(path[-1], default), doc)
        for path, hint, default, doc in _leaves(cls(), ())
        if _flag(path) not in shared
    ]
    settled |= {_flag(path): default for path, _, default, _ in leaves if path[-1] in settled}

    def make(**given: Any) -> S:
        return _built(cls(), (), {**settled, **given})  # type: ignore[no-any-return]

    hints = {
        _flag(p): Annotated[hint, Parameter(help=doc, consume_multiple=True)] for p, hint, _, doc in leaves
    }
    make.__annotations__ = hints
    make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                _flag(p), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[_flag(p)]
            )
            for p, _, default, _ in leaves
        ]
    )
    app.default(make)
    return app


def _leaves(made: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any, str]]:
    """Path, type, default and description of every plain field of a dataclass instance and of those in it."""
    from docstring_parser import parse_from_object

    hints = get_type_hints(type(made))
    docs = {
        p.arg_name: p.description or ""
        for cls in filter(dataclasses.is_dataclass, reversed(type(made).__mro__))
        for p in parse_from_object(cls).params
    }
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, (*path, field.name))
        else:
            yield (*path, field.name), hints[field.name], value, " ".join(docs.get(field.name, "").split())


def _flag(path: tuple[str, ...]) -> str:
    return "_".join(part for part in path if part != "training")


def _built(made: Any, path: tuple[str, ...], given: Mapping[str, Any]) -> Any:
    """A copy of a (nested) dataclass instance with the given leaves in place of its own, all at once."""
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    changed = {
        name: _built(value, (*path, name), given)
        if dataclasses.is_dataclass(value)
        else given.get(_flag((*path, name)), value)
        for name, value in fields.items()
    }
    return dataclasses.replace(made, **changed)


def method_settings(
    command: str, cls: type[S], tokens: Sequence[str], shared: Mapping[str, Any] = MappingProxyType({})
) -> S:
    """Make a method from its own options on the command line, and those it shares with the command.

    Raises:
        CycloptsError: an unknown option, or a value of another type.
        InputError: a value that the method itself refuses.
    """
    try:
        made: S = method_app(command, cls, shared)(
            list(tokens), exit_on_error=False, print_error=False, result_action="return_value"
        )
    except ValueError as error:
        raise InputError(f"{command}: {error}") from error
    return made


def settings_from(
    where: str, cls: type[S], given: Mapping[str, Any], shared: Mapping[str, Any] = MappingProxyType({})
) -> S:
    """Make a method from a table of its options, as in a TOML file; names as on the command line.

    Raises:
        InputError: an unknown option or a value that the method refuses.
    """
    try:
        return method_settings(where, cls, current_options(tokens_of(given)), shared)
    except CycloptsError as error:
        raise InputError(f"{where}: {error}") from error
