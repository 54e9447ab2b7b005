"""The public formats of fact files: by which fields each is known, and which of them its reader uses.

A record is only read as a format where every field is one that the format knows: what would be dropped is a reason to
refuse, since it may be what the answer depends on (the options of a choice, the article of a question). A new format is
one function and one entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from locus.errors import InputError
from locus.readers.chat_messages import chat_messages
from locus.readers.counterfact import counterfact, easyedit
from locus.readers.lama import lama
from locus.readers.lre import lre
from locus.readers.mquake import mquake
from locus.readers.multiple_choice import LETTERS, multiple_choice
from locus.readers.plain_text import BLOCK_WORDS, corpus, text_records
from locus.readers.records import Record
from locus.readers.ripple_edits import ripple_edits
from locus.readers.rows import (
    completion,
    counterfact_tracing,
    instruction,
    known_1000,
    knowundo,
    lume,
    muse_verbatim,
    popqa,
    rwku,
    tofu,
    triples,
    trivia_qa,
)
from locus.readers.squad import nested, squad
from locus.readers.translation import TOFU_TEMPLATE, slug
from locus.readers.zsre import zsre

__all__ = ["BLOCK_WORDS", "FORMATS", "TOFU_TEMPLATE", "Format", "detect", "slug", "text_records"]

LABELS = frozenset({
    "id", "_id", "uid", "uuid", "qid", "idx", "index", "no", "number", "case_id", "question_id",
    "example_id", "sample_id", "row_id", "split", "dataset_id", "dataset", "source_dataset", "url",
    "doi", "date", "language", "lang", "license", "__index_level_0__",
})  # fmt: skip
"""Fields that number or file a record in any format, and say nothing of the fact."""


@dataclass(frozen=True)
class Format:
    """How a format is known and read."""

    read: Callable[[Record], Record | Iterable[Record]]
    """One record into one fact or several, in our own fields."""
    about: str
    """Whose format it is."""
    shapes: tuple[frozenset[str], ...]
    """Sets of fields of which one must be there whole."""
    uses: frozenset[str] = frozenset()
    """Further fields that are read."""
    labels: frozenset[str] = frozenset()
    """Fields that say nothing of the fact, besides `LABELS`."""
    drops_rest: bool = False
    """Whether any other field is dropped: of our own fields and of bare triples the fact reader itself decides."""

    def fits(self, found: Iterable[str]) -> bool:
        """Whether these fields make one of its shapes."""
        return any(shape <= set(found) for shape in self.shapes)

    @property
    def read_fields(self) -> frozenset[str]:
        """Every field that it uses, in any of its shapes."""
        return self.uses.union(*self.shapes)

    def dropped(self, record: Record) -> list[str]:
        """Fields of a record that hold something and that nobody would read."""
        if self.drops_rest:
            return []
        known = self.read_fields | self.labels | LABELS
        return [name for name, value in record.fields.items() if name not in known and not _is_empty(value)]

    def facts(self, record: Record) -> Iterator[Record]:
        """The record in our own fields."""
        made = self.read(record)
        if isinstance(made, Record):
            yield made
        else:
            yield from made


def _is_empty(value: object) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _format(
    read: Callable[[Record], Record | Iterable[Record]],
    about: str,
    *shapes: str,
    uses: str = "",
    labels: str = "",
) -> Format:
    return Format(
        read,
        about,
        tuple(frozenset(one.split()) for one in shapes),
        frozenset(uses.split()),
        frozenset(labels.split()),
    )


def _ours(record: Record) -> Record:
    return record


FORMATS: dict[str, Format] = {
    "jsonl": Format(_ours, "our own fields", (frozenset({"prompt", "target"}),), drops_rest=True),
    "mquake": _format(
        mquake, "MQuAKE", "requested_rewrite questions answer",
        uses="new_answer", labels="answer_alias new_answer_alias single_hops new_single_hops orig answer_extended "
        "new_answer_extended",
    ),
    "counterfact": _format(
        counterfact, "CounterFact", "requested_rewrite",
        uses="paraphrase_prompts neighborhood_prompts relation_id",
        labels="pararel_idx attribute_prompts generation_prompts",
    ),
    "zsre": _format(
        zsre, "zsRE (MEND's evaluation set, EasyEdit)", "src answers", "src alt loc",
        uses="subject rephrase alt loc loc_ans", labels="pred cond portability output filtered_rephrases",
    ),
    "ripple-edits": _format(
        ripple_edits, "RippleEdits", "edit Relation_Specificity",
        uses="Forgetfulness",
        labels="example_type Logical_Generalization Subject_Aliasing Compositionality_I Compositionality_II",
    ),
    "lre": _format(
        lre, "relations of LRE", "prompt_templates samples",
        uses="name prompt_templates_zs", labels="properties _dataset_name",
    ),
    "lama": _format(
        lama, "LAMA, ParaRel", "sub_label obj_label",
        uses="predicate_id template",
        labels="sub_uri obj_uri sub_surface obj_surface masked_sentence template_negated label description type "
        "evidences sub obj pred lineid sub_aliases obj_aliases",
    ),
    "counterfact-tracing": _format(
        counterfact_tracing, "counterfact-tracing", "prompt target_true target_false subject",
        uses="relation_id", labels="relation relation_prefix relation_suffix target_false_id target_true_id",
    ),
    "easyedit": _format(
        easyedit, "EasyEdit's CounterFact, KnowEdit", "prompt target_new subject", "prompt ground_truth subject",
        uses="ground_truth target_new rephrase_prompt rephrase locality_prompt locality_ground_truth locality "
        "relation_id",
        labels="portability cond",
    ),
    "popqa": _format(
        popqa, "PopQA", "question obj subj",
        uses="prop",
        labels="subj_id prop_id obj_id s_aliases o_aliases s_uri o_uri s_wiki_title o_wiki_title s_pop o_pop "
        "possible_answers",
    ),
    "rwku": _format(
        rwku, "RWKU", "query answer", uses="type subject neighbor", labels="level",
    ),
    "squad": _format(
        squad, "SQuAD", "question context answers", uses="title", labels="is_impossible plausible_answers",
    ),
    "nested-qa": _format(
        nested, "SQuAD and TriviaQA as one object", "data", "Data",
        labels="version VerifiedEval Domain Split Version",
    ),
    "trivia-qa": _format(
        trivia_qa, "TriviaQA", "question answer question_source", "Question Answer",
        labels="entity_pages search_results question_source QuestionId QuestionSource EntityPages SearchResults "
        "QuestionVerifiedEvalAttempt QuestionPartOfVerifiedEval",
    ),
    "multiple-choice": _format(
        multiple_choice, "MMLU, MMLU-Pro, WMDP, RACE, ARC",
        "question choices answer", "question options answer", "question options answer_index",
        "question A B answer", "question choices answerKey", "question_stem choices answerKey",
        uses=f"article passage context subject category question answer {' '.join(LETTERS)}",
        labels="cot_content src level difficulty topic",
    ),
    "muse-verbmem": _format(muse_verbatim, "MUSE verbmem", "prompt gt"),
    "knowundo": _format(knowundo, "KnowUnDo", "text labels", labels="type category"),
    "corpus": _format(
        corpus, "WMDP's corpora, MUSE raw, RWKU's passages", "text",
        labels="title abstract subject meta metadata timestamp tags",
    ),
    "chat": _format(chat_messages, "chat messages", "messages", "conversations", labels="system tools source"),
    "lume": _format(lume, "LUME", "input output task", "input output", uses="task"),
    "instruction": _format(instruction, "Alpaca's instructions", "instruction output", uses="input"),
    "completion": _format(completion, "prompts and completions", "prompt completion", "prompt response"),
    "known_1000": _format(
        known_1000, "ROME's known_1000", "subject prompt attribute",
        uses="template relation_id known_id", labels="prediction known_id",
    ),
    "tofu": _format(
        tofu, "TOFU, MUSE knowmem", "question answer",
        uses="paraphrased_answer perturbed_answer paraphrased_question option1 option2 option3 option4 relation_id",
        labels="author author_id",
    ),
    "triples": Format(
        triples, "bare triples", (frozenset({"subject", "prompt", "target"}),), frozenset({"relation_id"}),
        drops_rest=True,
    ),
}  # fmt: skip
"""How a JSON record of each format is translated; "text" has no records, see `text_records`."""


def detect(record: Record, in_array: bool, ours: set[str]) -> str:
    """The format of a first record, by all its fields.

    Args:
        record: With the fields that are there.
        in_array: Whether it stands in a JSON array: bare triples do.
        ours: The fields that our own format has.

    Raises:
        InputError: no format has these fields, or the one that has most of them would drop the others.
    """
    found = {name for name, value in record.fields.items() if value is not None}
    if not any(format.fits(found) for format in FORMATS.values()):
        found = set(record.fields)  # the reader then says which of them must not be null
    triple = {"subject", "prompt", "target"}
    if in_array and triple <= found and not (found - triple) & ours:
        return "triples"
    if {"prompt", "target"} <= found:
        return "jsonl"
    near: list[tuple[int, str]] = []
    for name, format in FORMATS.items():
        if name in ("jsonl", "triples") or not format.fits(found):
            continue
        if not (dropped := format.dropped(record)):
            return name
        near.append((len(dropped), name))
    if near:
        _, name = min(near, key=lambda pair: pair[0])
        refuse_dropped(record, name)
    if {"prompt", "target"} & found or not found:
        return "jsonl"
    shown = ", ".join(f'"{name}"' for name in list(record.fields)[:8])
    raise InputError(
        f'{record.place}: no known format has the fields {shown}: give "prompt" and "target", or one of '
        f"{', '.join(FORMATS)} by name"
    )


def refuse_dropped(record: Record, name: str) -> None:
    """Raise InputError where the reader of the format `name` would leave out a field of a record."""
    if dropped := FORMATS[name].dropped(record):
        shown = ", ".join(f'"{one}"' for one in dropped[:5])
        raise InputError(
            f"{record.place}: looks like {name} ({FORMATS[name].about}), but nothing would be made of {shown}: take "
            f"it out, or convert with: locus facts FILE --format {name} --write out.jsonl"
        )
