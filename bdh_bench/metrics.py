"""The one table of metrics: name → unit, better, label, meaning, and how raw values become one number.

Command line help, the report and the documentation are generated from this table; units are SI base units and
prefixes belong to the view. ``reduction`` says how the raw measurements of one point are reduced:

* ``ratio``   Σ value·weight / Σ weight over samples (documents); the interval resamples samples,
* ``share``   the same sum over trials that succeeded (1) or failed (0), each independent, ``weight`` of them; Wilson's interval,
* ``median``  the median over repeats (windows); an interval needs at least three rounds,
* ``exact``   an integer that every repeat must agree on; no interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bdh_bench.errors import UnknownNameError


@dataclass(frozen=True)
class Metric:
    """One metric. ``unit`` is a base unit; ``better`` is the direction that wins."""

    name: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    label: str
    meaning: str
    reduction: Literal["ratio", "share", "median", "exact"]


_TABLE = (
    Metric(
        "bits_per_byte",
        "bit/byte",
        "lower",
        "bits per byte (same targets)",
        "Mean negative log2-likelihood of the same target bytes after exactly c bytes of context; "
        "every context and every model scores identical bytes.",
        "ratio",
    ),
    Metric(
        "stream_bits_per_byte",
        "bit/byte",
        "lower",
        "bits per byte (stream)",
        "Mean negative log2-likelihood of every byte of a document read once from an empty state to its end.",
        "ratio",
    ),
    Metric(
        "burn_in_bits_per_byte",
        "bit/byte",
        "lower",
        "bits per byte (stream without its beginning)",
        "Bits per byte of the stream's bytes after the first 16 of each document, which a start symbol, or none, weighs on most.",
        "ratio",
    ),
    Metric(
        "halfway_bits_per_byte",
        "bit/byte",
        "neither",
        "bits per byte at half of the training",
        "Bits per byte of the same target bytes with the weights that the model had after half of its training bytes; says whether more "
        "training changes what lies beyond the training context, and is compared with no other model.",
        "ratio",
    ),
    Metric(
        "boundary_bits_per_byte",
        "bit/byte",
        "lower",
        "cost of a missing reset",
        "Bits per byte of a document read after another one without a reset, less those of the document alone.",
        "ratio",
    ),
    Metric(
        "position_bits_per_byte",
        "bit/byte",
        "lower",
        "bits per byte by position (stream)",
        "Bits per byte of the stream's bytes from the given position up to the end of its bucket. The text differs between buckets: "
        "compare models within a bucket, never two buckets of one model.",
        "ratio",
    ),
    Metric(
        "recall_bits_per_byte",
        "bit/byte",
        "lower",
        "bits per byte by match distance (stream)",
        "Bits per byte of the stream's bytes whose last 12 bytes occurred d bytes ago with the same next byte (recall), only with "
        "another one (conflict), or not before (novel).",
        "ratio",
    ),
    Metric(
        "context_gain",
        "bit/byte",
        "higher",
        "gain from context",
        "Bits per byte of the same targets after the shortest context, less those after c bytes.",
        "ratio",
    ),
    Metric(
        "context_slope",
        "bit/byte",
        "lower",
        "change per doubling of the context",
        "Slope of the least-squares line of bits per byte of the same targets against log2 of the context, over all its contexts.",
        "ratio",
    ),
    Metric(
        "state_bytes",
        "byte",
        "lower",
        "state bytes",
        "Bytes of the tensors that must survive until the next token (KV cache or recurrent state), by census; "
        "equal to the model's formula.",
        "exact",
    ),
    Metric(
        "capacity_bytes",
        "byte",
        "lower",
        "reserved state bytes",
        "Bytes of the storages behind the state, with what a preallocated cache keeps in reserve.",
        "exact",
    ),
    Metric(
        "weights_bytes",
        "byte",
        "lower",
        "weight bytes",
        "Bytes of the unique storages of parameters and buffers.",
        "exact",
    ),
    Metric(
        "prefill_peak_live_bytes",
        "byte",
        "lower",
        "prefill peak above the loaded process",
        "High-water mark of memory during prefill, minus what was held before it; keep=last asks for the last logits of each piece, "
        "keep=all for all of them.",
        "median",
    ),
    Metric(
        "decode_peak_live_bytes",
        "byte",
        "lower",
        "decode peak above the loaded process",
        "High-water mark of memory during decoding, minus what was held before it.",
        "median",
    ),
    Metric(
        "peak_footprint_bytes",
        "byte",
        "lower",
        "peak footprint of the process",
        "Absolute high-water mark of the process over prefill and decoding: the number that decides out-of-memory.",
        "median",
    ),
    Metric(
        "logits_bytes",
        "byte",
        "lower",
        "logits of one piece",
        "The largest storage of logits that one call of prefill handed out; in the peak of prefill, and no activation.",
        "exact",
    ),
    Metric(
        "fragmentation_bytes",
        "byte",
        "lower",
        "memory not given back",
        "What the process holds more than before once all streams are gone and the heap is trimmed; on CUDA reserved minus allocated.",
        "median",
    ),
    Metric(
        "state_save_s",
        "s",
        "lower",
        "saving a stream",
        "Wall time to write one stream's state to a file (safetensors, page cache), with the fingerprint of the weights.",
        "median",
    ),
    Metric(
        "state_restore_s",
        "s",
        "lower",
        "restoring a stream",
        "Wall time to bring a saved stream back to life, with the check of the weights' fingerprint.",
        "median",
    ),
    Metric(
        "state_fork_s",
        "s",
        "lower",
        "forking a stream",
        "Wall time to make an independent copy of one stream in memory.",
        "median",
    ),
    Metric(
        "weights_fingerprint_s",
        "s",
        "lower",
        "fingerprint of the weights",
        "Wall time to hash the model's weights: the part of saving and of restoring that does not depend on the state.",
        "median",
    ),
    Metric(
        "state_file_bytes",
        "byte",
        "lower",
        "file of a stream",
        "Size of the file that holds one saved stream.",
        "exact",
    ),
    Metric(
        "state_fork_bytes",
        "byte",
        "lower",
        "memory of a fork",
        "Bytes of the storages behind a fork at the moment it is made.",
        "exact",
    ),
    Metric(
        "capacity_streams",
        "stream",
        "higher",
        "streams within the budget",
        "The largest batch of streams at this context whose whole process stayed within the memory budget; 0 where one stream did not.",
        "median",
    ),
    Metric(
        "capacity_refused_streams",
        "stream",
        "higher",
        "fewest streams past the budget",
        "The smallest batch of streams at this context that was tried and did not stay within the memory budget.",
        "median",
    ),
    Metric(
        "capacity_predicted_streams",
        "stream",
        "neither",
        "streams within the budget, by formula",
        "What one stream leaves of the budget, divided by the bytes of its state and the workspace of a stream fitted on small batches.",
        "median",
    ),
    Metric(
        "capacity_tokens_per_s",
        "token/s",
        "higher",
        "decoded tokens per second, all streams that fit",
        "Streams over the wall time of a decoding step, with the largest batch that fits the memory budget at this context.",
        "median",
    ),
    Metric(
        "stream_tokens_per_s",
        "token/s",
        "higher",
        "decoded tokens per second, one stream",
        "One over the wall time of a decoding step of a single stream in the same kind of process.",
        "median",
    ),
    Metric(
        "probe_footprint_bytes",
        "byte",
        "lower",
        "footprint of a probe",
        "High-water mark of the whole process of one probe of a batch; without a value where it was past the budget.",
        "median",
    ),
    Metric(
        "probe_step_s",
        "s",
        "lower",
        "step of a probe",
        "Mean wall time of a decoding step of all streams of one probe, over a window of steps.",
        "median",
    ),
    Metric(
        "prefill_s",
        "s",
        "lower",
        "prefill",
        "Wall time from the first model call on the prompt until the logits of its last position are ready.",
        "median",
    ),
    Metric(
        "ttft_s",
        "s",
        "lower",
        "time to first token",
        "Prefill plus one greedy choice; loading and compilation are not in it.",
        "median",
    ),
    Metric(
        "tpot_s",
        "s",
        "lower",
        "time per output token",
        "Wall time of a window of decoding steps that starts at the given depth, over its steps; choosing each token is in it.",
        "median",
    ),
    Metric(
        "tpot_by_difference_s",
        "s",
        "neither",
        "time per output token, by difference",
        "A window of 2g steps less one of g steps, over g: equal to the time per output token, unless work is put off into the first "
        "steps; then the rows are unsteady.",
        "median",
    ),
    Metric(
        "itl_s",
        "s",
        "lower",
        "time between tokens",
        "Quantiles of single decoding steps of a round; the first token is not among them.",
        "median",
    ),
    Metric(
        "first_call_s",
        "s",
        "neither",
        "first call",
        "The very first prefill and decoding step of the process, before any warm-up.",
        "median",
    ),
    Metric(
        "compile_s",
        "s",
        "neither",
        "compilation",
        "Wall time of the first reading of the prompt and some steps that compiles the model, before any warm-up.",
        "median",
    ),
    Metric(
        "energy_per_token_j",
        "J",
        "lower",
        "energy per output token",
        "Difference of the hardware's energy counter over at least ten seconds of decoding, over the tokens; other programs are in it.",
        "median",
    ),
    Metric(
        "harness_overhead_share",
        "share",
        "lower",
        "share of the stamps",
        "Cost of the stamps around every step, measured on steps that do nothing, over the time of the windows.",
        "median",
    ),
    Metric(
        "prefill_tokens_per_s",
        "token/s",
        "higher",
        "prefill speed",
        "Batch times context over prefill_s: made when results are read.",
        "median",
    ),
    Metric(
        "decode_tokens_per_s",
        "token/s",
        "higher",
        "decoding speed of all streams",
        "Batch over tpot_s: made when results are read, and what capacity is planned with.",
        "median",
    ),
    Metric(
        "key_density",
        "share",
        "neither",
        "active keys",
        "Share of key activations xs that are not zero, by pass.",
        "ratio",
    ),
    Metric(
        "gate_density",
        "share",
        "neither",
        "active gates",
        "Share of gate activations ys that are not zero, by pass.",
        "ratio",
    ),
    Metric(
        "gated_density",
        "share",
        "neither",
        "active products",
        "Share of products xs ⊙ ys that are not zero, by pass: what the decoder reads.",
        "ratio",
    ),
    Metric(
        "state_norm",
        "1",
        "neither",
        "norm of the state",
        "Euclidean norm of the memory of a pass after so many bytes.",
        "ratio",
    ),
    Metric(
        "key_cosine",
        "1",
        "neither",
        "overlap of keys",
        "Mean cosine of the keys, before rotation, of two tokens at the given distance.",
        "ratio",
    ),
    Metric(
        "lm_eval_bits_per_byte",
        "bit/byte",
        "lower",
        "bits per byte (lm-eval)",
        "Negative log2-likelihood of the documents of an lm-eval task over their UTF-8 bytes, a ratio of sums; comparable only within one "
        "task, version and windowing.",
        "ratio",
    ),
    Metric(
        "lm_eval_accuracy",
        "share",
        "higher",
        "accuracy (lm-eval)",
        "Share of documents on which the right answer has the largest log-likelihood (or is the greedy one); lm-eval's acc.",
        "ratio",
    ),
    Metric(
        "lm_eval_accuracy_norm",
        "share",
        "higher",
        "accuracy per character (lm-eval)",
        "Share of documents on which the right answer has the largest log-likelihood per character; lm-eval's acc_norm.",
        "ratio",
    ),
    Metric(
        "lm_eval_accuracy_bytes",
        "share",
        "higher",
        "accuracy per byte (lm-eval)",
        "Share of documents on which the right answer has the largest log-likelihood per byte; lm-eval's acc_bytes.",
        "ratio",
    ),
    Metric(
        "lm_eval_exact_match",
        "share",
        "higher",
        "exact match (lm-eval)",
        "Share of documents whose greedily written answer is the wanted one; lm-eval's exact_match.",
        "ratio",
    ),
    Metric(
        "lm_eval_target_bits",
        "bit",
        "lower",
        "bits of the answer (lm-eval)",
        "Mean negative log2-likelihood of the wanted continuation; lm-eval prints its exponential as perplexity.",
        "ratio",
    ),
    Metric(
        "lm_eval_score",
        "1",
        "neither",
        "score (lm-eval)",
        "The mean over documents of another metric of an lm-eval task, named on the axis lm_eval_metric.",
        "ratio",
    ),
    Metric(
        "row_density",
        "share",
        "neither",
        "active rows of the memory",
        "Share of rows of the memory that the last measured token touched, by pass; decides between sparse and dense decoding.",
        "median",
    ),
    Metric(
        "recall_accuracy",
        "share",
        "higher",
        "recall accuracy",
        "Share of questions for which the value of the asked key is the likeliest token.",
        "share",
    ),
    Metric(
        "recall_stale_share",
        "share",
        "lower",
        "stale answers",
        "Share of questions answered with a value that was overwritten since.",
        "share",
    ),
    Metric(
        "induction_accuracy",
        "share",
        "higher",
        "induction accuracy",
        "Share of texts in which the token that once followed the trigger is the likeliest after its return.",
        "share",
    ),
    Metric(
        "copy_accuracy",
        "share",
        "higher",
        "copied symbols",
        "Share of symbols of a text that are the likeliest when the text is to be repeated.",
        "share",
    ),
    Metric(
        "copy_exact",
        "share",
        "higher",
        "copied texts",
        "Share of texts that are repeated without a mistake.",
        "share",
    ),
    Metric(
        "needle_accuracy",
        "share",
        "higher",
        "needles found",
        "Share of prompts in which every digit of the hidden key is the likeliest byte given those before it.",
        "share",
    ),
    Metric(
        "needle_rank_accuracy",
        "share",
        "higher",
        "needles ranked first",
        "Share of prompts in which the hidden key is the likeliest of ten candidates; chance is 0.1.",
        "share",
    ),
    Metric(
        "needle_bits_per_byte",
        "bit/byte",
        "lower",
        "bits per digit of the needle",
        "Mean negative log2-likelihood of the digits of the hidden key.",
        "ratio",
    ),
    Metric(
        "repeat_gain_bits_per_byte",
        "bit/byte",
        "higher",
        "gain from having read a passage before",
        "Bits per byte of a passage at its first reading minus those at its second, after a gap.",
        "ratio",
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}


def metric(name: str) -> Metric:
    """The metric called ``name``. Raises UnknownNameError."""
    try:
        return METRICS[name]
    except KeyError:
        raise UnknownNameError("metric", name, METRICS) from None
