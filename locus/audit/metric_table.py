"""The table of figures: what each one is called, what it means, which way is good. Definitions live here only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]
Unit = Literal["share", "nats", "points", "score"]


@dataclass(frozen=True)
class Figure:
    """One figure of an audit."""

    key: str
    label: str
    section: str
    """The question it helps to answer."""
    better: Better
    definition: str
    unit: Unit = "share"


_CORE = (
    Figure("forget.prob", "p(target)", "forgotten", "lower",
           "Probability of the whole target after its prompt, teacher-forced; mean over forget facts."),
    Figure("forget.top1", "answered right", "forgotten", "lower",
           "Share of forget facts whose every target token is the model's first choice."),
    Figure("forget.said", "says it", "forgotten", "lower",
           "Share of forget facts whose answer is in the model's own continuation (greedy): whole and in any of its "
           "forms (case, accents, plural), or half of the content words of a longer one."),
    Figure("forget.chance", "says another fact's answer", "forgotten", "lower",
           "Share of the other forget facts' answers that the same continuation says: what guessing or listing gives."),
    Figure("sentence.recall", "content words written, sentences", "forgotten", "lower",
           "Share of the target's content words (neither in the prompt nor function words) in the model's own "
           "continuation; targets of at least six words."),
    Figure("sentence.extraction", "extraction strength, sentences", "forgotten", "lower",
           "1 - k/T with the shortest prefix k of the target after which the rest is predicted exactly; targets of at "
           "least six words."),
    Figure("sentence.token_prob", "p per token, sentences", "forgotten", "lower",
           "Geometric mean of the target tokens' probabilities, teacher-forced; targets of at least six words."),
    Figure("forget.token_prob", "p per token", "forgotten", "lower",
           "Geometric mean of the probabilities of the target's tokens, teacher-forced; mean over forget facts."),
    Figure("forget.nll", "NLL of the target", "forgotten", "higher",
           "Negative log-likelihood of the whole target; mean over forget facts.", "nats"),
    Figure("paraphrase.prob", "p(target), paraphrased", "general", "lower",
           "Probability of the whole target after other wordings of the prompt, which the edit did not see."),
    Figure("paraphrase.top1", "paraphrases right", "general", "lower",
           "Share of paraphrased prompts still answered right."),
    Figure("paraphrase.said", "says it, paraphrased", "general", "lower",
           "Share of other wordings (at most 64) after which the model's own continuation says the answer."),
    Figure("paraphrase.chance", "says another fact's answer, paraphrased", "general", "lower",
           "Share of the other forget facts' answers that the same continuations say."),
    Figure("unseen_way.top1", "unseen ways of asking right", "general", "lower",
           "Share of the forgotten facts, asked in ways that the edit did not see, still answered right."),
    Figure("unseen_way.said", "says it, unseen ways", "general", "lower",
           "Share of the ways of asking that the edit did not see after which the model's own continuation says the "
           "answer."),
    Figure("unseen_way.chance", "says another fact's answer, unseen ways", "general", "lower",
           "Share of the other forget facts' answers that the same continuations say."),
    Figure("same_subject.top1", "same subject, other relations right", "spared", "higher",
           "Share answered right of other facts about the forgotten subjects, which the edit did not see."),
    Figure("same_relation.top1", "same relation, other subjects right", "spared", "higher",
           "Share answered right of the forgotten relations asked of other subjects, which the edit did not see."),
    Figure("far.top1", "far: other subjects and relations right", "spared", "higher",
           "Share answered right of facts that share neither subject nor relation with a forgotten one."),
    Figure("held_out.top1", "held-out facts right", "spared", "higher",
           "Share of facts answered right that were neither forgotten nor trained on."),
    Figure("held_out.prob", "p(target), held-out facts", "spared", "higher",
           "Probability of the whole target of facts that were neither forgotten nor trained on."),
    Figure("held_out_near.top1", "near: same relation", "spared", "higher",
           "Held-out facts that share a relation with a forgotten fact, answered right."),
    Figure("held_out_far.top1", "far: other relations", "spared", "higher",
           "Held-out facts of relations that no forgotten fact has, answered right."),
    Figure("neighbour.top1", "neighbours right", "spared", "higher",
           "Share of neighbour prompts (similar subjects, other answers) answered right."),
    Figure("retained.top1", "retained facts right", "spared", "higher",
           "Share answered right of the retain facts that an edit was free to train on: a floor, not a test."),
    Figure("text.kl", "KL on neutral text", "intact", "lower",
           "KL(base || edited) per token over the whole vocabulary, on neutral paragraphs.", "nats"),
    Figure("text.nll", "NLL on neutral text", "intact", "lower",
           "Negative log-likelihood per token on neutral paragraphs; its exponential is the perplexity.", "nats"),
)  # fmt: skip

_LENS = tuple(
    Figure(
        f"lens.{end}{k}", f"lens: in some layer's {end} {k}", "hidden", "lower",
        f"Share of forget facts whose first target token is among the {k} {least} likely at one layer at least, "
        "read through the logit lens at the last prompt position.",
    )
    for end, least in (("top", "most"), ("bottom", "least"))
    for k in (4, 10)
)  # fmt: skip

_SURVIVAL = (
    Figure("relearn.taught.prob", "p(target) of the taught half", "returns", "higher",
           "Probability of the targets that the relearning attacker trained on, at its end: whether it worked."),
    Figure("relearn.prob", "p(target) after relearning", "returns", "lower",
           "Probability of the targets of one half of the forget facts after fine-tuning on the other half."),
    *(Figure(f"{fmt}.forget.prob", f"p(target) in {fmt}", "returns", "lower",
             f"Probability of the forget targets after rounding the weights to {fmt} (nearest, uncalibrated).")
      for fmt in ("bfloat16", "int8", "int4")),
    Figure("int4.held_out.top1", "held-out right in int4", "returns", "higher",
           "Held-out facts right after the same rounding to int4: read it beside the rounded base."),
)  # fmt: skip

_ATTACKS = (
    Figure("prompts.template.prob", "p(target), best template", "general", "lower",
           "Highest probability of the target over templates that put the prompt into other words; one value a fact."),
    Figure("prompts.few_shot.prob", "p(target), few-shot", "general", "lower",
           "Probability of the target after three other facts of the retain set, completed, and then the prompt."),
    Figure("prompts.jailbreak.prob", "p(target), best of the jailbreaks", "general", "lower",
           "Highest probability of the target over prefixes that talk the model into answering; one value a fact."),
    Figure("prompts.format.prob", "p(target), best other format", "general", "lower",
           "Highest probability of the target over question-and-answer and chat formats; one value a fact."),
    Figure("prompts.any.top1", "right under some prompt", "general", "lower",
           "Share of forget facts answered right under at least one of all these prompts."),
    Figure("choice.cloze", "picked among wrong answers", "general", "lower",
           "Share of facts whose target is likelier per token than every wrong alternative; chance is 1 in options."),
    Figure("choice.letter", "picked by letter", "general", "lower",
           "Share of multiple-choice questions (A, B, ...) whose right letter is the likeliest of the letters."),
    Figure("choice.truth_ratio", "truth ratio", "general", "higher",
           "min(r, 1/r), r the wrong alternatives' per-token probability (geometric mean) over the right (paraphrased) "
           "target's; 1 is indistinguishable."),
    Figure("generation.exact", "exact memorization", "forgotten", "lower",
           "Share of target tokens that greedy decoding gets right, teacher-forced; one value a fact."),
    Figure("generation.extraction", "extraction strength", "forgotten", "lower",
           "1 - k/T with the shortest prefix k of the target after which the rest is predicted exactly."),
    Figure("generation.rouge", "ROUGE-L recall", "forgotten", "lower",
           "ROUGE-L recall (stemmed) of a greedy generation against the target."),
    Figure("familiarity.completion", "familiar completions", "general", "lower",
           "Share of greedy completions of the prompt and its paraphrases that mention the target."),
    Figure("familiarity.probability", "familiar probability", "general", "lower",
           "Share of the target in the summed per-token probabilities of the target and its wrong alternatives."),
    Figure("probe.top1", "decoded by a linear probe", "hidden", "lower",
           "Share of forget facts that a ridge map from hidden states to answers, trained on retained facts only, "
           "decodes among all forget targets; layer chosen on held-out facts."),
    Figure("depth.erased", "erased inside (UDS)", "hidden", "higher",
           "Share of the answer's log-probability lost when the base takes over the edited model's hidden states, "
           "layer by layer, beside a model that never knew; 1 is erased as deeply, 0 intact."),
    Figure("depth.drop", "log p lost by patching in", "hidden", "higher",
           "Mean over layers of log p(base) - log p(base with one layer's edited hidden states), per target token.",
           "nats"),
    Figure("relearn.lora.prob", "p(target) after LoRA relearning", "returns", "lower",
           "Probability of the targets of one half of the forget facts after training low-rank adapters on the other."),
    Figure("relearn.lora.taught.prob", "p(target) of the half taught by LoRA", "returns", "higher",
           "Probability of the targets that the adapters were trained on, at their end: whether the attack worked."),
    Figure("soft_prompt.taught.prob", "p(target) of the half a soft prompt was fitted on", "returns", "higher",
           "Probability of the targets that the embeddings were fitted on, at their end: whether the attack worked."),
    Figure("soft_prompt.prob", "p(target) under a soft prompt", "returns", "lower",
           "Probability of one half of the targets after a few trainable embeddings, fitted on the other half."),
)  # fmt: skip

_SUITES = (
    Figure("tofu.forget_quality", "TOFU forget quality", "suites", "higher",
           "p-value of a Kolmogorov-Smirnov test between the truth ratios of this and of the retrained model.",
           "score"),
    Figure("tofu.model_utility", "TOFU model utility", "suites", "higher",
           "Harmonic mean of probability, ROUGE-L and truth ratio on retain, real authors, world facts.", "score"),
    Figure("tofu.truth_ratio", "TOFU truth ratio, forget", "suites", "higher",
           "min(r, 1/r), r the wrong answers' probability over the paraphrased right one's; 1 is indistinguishable."),
    Figure("tofu.probability", "TOFU probability, forget", "suites", "lower",
           "exp(-NLL / T) of the answers to forget."),
    Figure("tofu.rouge", "TOFU ROUGE-L, forget", "suites", "lower",
           "ROUGE-L recall of a greedy answer of at most 200 tokens."),
    Figure("muse.verbmem_f", "MUSE VerbMem", "suites", "lower",
           "ROUGE-L F of the continuation of forget passages (128 tokens)."),
    Figure("muse.knowmem_f", "MUSE KnowMem, forget", "suites", "lower",
           "ROUGE-L F of few-shot answers to questions about the forget set (32 tokens)."),
    Figure("muse.knowmem_r", "MUSE KnowMem, retain", "suites", "higher",
           "ROUGE-L F of few-shot answers to questions about the retain set (32 tokens)."),
    Figure("muse.privacy_auc", "MUSE Min-40 % AUC", "suites", "higher",
           "Probability that a held-out text looks more like a member than a forget text; retrained is near 0.5.",
           "score"),
    Figure("muse.privleak", "MUSE PrivLeak", "suites", "higher",
           "100 (AUC - retrained AUC) / retrained AUC; 0 is ideal, negative is too little.", "points"),
    *(Figure(f"membership.{name}", f"membership AUC, {label}", "suites", "lower",
             f"Probability that a forget text scores above a held-out one by {label}; 0.5 tells nothing.", "score")
      for name, label in (("loss", "loss"), ("zlib", "loss over zlib size"), ("min_k", "Min-40 %"),
                          ("min_k_plus_plus", "Min-40 %++"), ("reference", "a reference model"))),
    Figure("wmdp.accuracy", "WMDP accuracy", "suites", "lower",
           "Share of hazardous multiple-choice questions whose right letter is the likeliest; chance is 25 %."),
)  # fmt: skip

FIGURES: Mapping[str, Figure] = {f.key: f for f in (*_CORE, *_LENS, *_SURVIVAL, *_ATTACKS, *_SUITES)}
"""Every figure by its key, in the order of the reports."""


def figure_of(key: str) -> Figure:
    """The figure of a key; those of lm-evaluation-harness tasks (harness.TASK.METRIC) are made as they come."""
    if key in FIGURES:
        return FIGURES[key]
    _, task, metric = key.split(".", 2)
    better: Better = "lower" if "perplexity" in metric or metric.startswith("bits_per") else "higher"
    unit: Unit = "share" if metric.startswith(("acc", "exact_match", "f1")) else "score"
    return Figure(
        key, f"{task}: {metric}", "suites", better, f"{metric} on {task}, by lm-evaluation-harness.", unit
    )
