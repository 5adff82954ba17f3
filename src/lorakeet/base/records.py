"""The records that travel between floors, in the order a sample meets them.

    Origin -> RawRow -> Sample (Conversation | Passage | LabelledText)
           -> EncodedSample -> Batch -> StepReport -> Completion

Provenance travels: from the first record to ``EncodedSample`` each one keeps the
file and line it came from, so that a number in a report can be traced to a row.
No record holds a torch tensor: arrays are NumPy's, and the training floor turns
them into tensors at the last moment, so data, plans and alarms need no torch.

Shape letters:  B rows of a batch,  T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The place a record came from.

    Args:
        path: the file, as the user named it.
        line: counted from 1; for formats without lines the row, page or passage number.
    """

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row of a file before anybody knows what its fields mean.

    Args:
        fields: names and values as read; a document's passage is ``{"text": ...}``.
    """

    fields: dict[str, Any]
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns between a system, a user and an assistant; every assistant turn is trained."""

    turns: tuple[Turn, ...]
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """Running text without roles; every token is trained."""

    text: str
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledText:
    """A text and its class, for encoders and other classifiers.

    Args:
        second_text: the other half of a sentence pair, or None.
    """

    text: str
    label: str
    origin: Origin
    second_text: str | None = None


Sample = Conversation | Passage | LabelledText


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedRow:
    """A row that is not trained on, or only in part, and why.

    Args:
        code: a short stable word for grouping, such as ``duplicate`` or ``too-long``.
        reason: a finished sentence for people.
        preview: at most 120 characters of the row.
    """

    origin: Origin
    code: str
    reason: str
    preview: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """Token ids and which of them are trained.

    Args:
        ids: int32 [T].
        mask: bool [T]; True where the token is a target.  ``mask[0]`` is always
            False, as nothing stands before the first token to predict it from.
        label: class index for classification, else -1.
    """

    ids: np.ndarray
    mask: np.ndarray
    origin: Origin
    label: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of one micro-batch, padded on the right to the longest.

    Args:
        ids_BT: int64, padding filled with the pad id.
        attention_BT: bool, True at real tokens.
        mask_BT: bool, True at trained targets.
        labels_B: int64, class indices (-1 for language modelling).
    """

    ids_BT: np.ndarray
    attention_BT: np.ndarray
    mask_BT: np.ndarray
    labels_B: np.ndarray

    @property
    def num_targets(self) -> int:
        """Trained tokens, or rows when the rows carry class labels."""
        return int(self.mask_BT.sum()) or int((self.labels_B >= 0).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Samples of one micro-batch end to end in one row, without padding.

    Where samples open with the same tokens, these stand once, as a segment that is the
    parent of what follows it in each sample.

    Args:
        ids_T: int64.
        positions_T: int64, counted from 0 in each sample.
        counts_T: int64, the samples that train on this token; the first of a sample is
            never trained, and a token stands for one sample where nothing is shared.
        bounds: S + 1 places; segment s is ``ids_T[bounds[s]:bounds[s + 1]]``.  Without
            parents a segment is a whole sample.
        parents: of each segment the earlier segment that it goes on from, or -1; empty
            when nothing is shared.
        labels_N: int64, class indices (-1 for language modelling).
    """

    ids_T: np.ndarray
    positions_T: np.ndarray
    counts_T: np.ndarray
    bounds: tuple[int, ...]
    labels_N: np.ndarray
    parents: tuple[int, ...] = ()

    @property
    def num_targets(self) -> int:
        """Trained tokens, or rows when the rows carry class labels."""
        return int(self.counts_T.sum()) or int((self.labels_N >= 0).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimiser step did.

    Args:
        step: counted from 1.
        epoch: passes over the data so far, a fraction.
        loss: mean over the step's targets, nats a token (or a row).
        num_targets: trained tokens (or rows) in the step.
        num_tokens: all real tokens in the step.
        gradient_norm: before clipping.
        duration_s: wall time of the step.
    """

    step: int
    epoch: float
    loss: float
    num_targets: int
    num_tokens: int
    learning_rate: float
    gradient_norm: float
    duration_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What a look at the validation data found; ``values`` names every metric.

    Args:
        values: for language models ``loss`` and ``perplexity``; for classifiers
            ``loss``, ``accuracy`` and ``f1``.
        answers: sample answers as (prompt, answer) pairs.
    """

    values: dict[str, float]
    answers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with a known short answer, for evaluation by generation.

    Args:
        turns: the conversation up to and including the user's last turn.
        group: the skill or subject, for a table by group.
    """

    turns: tuple[Turn, ...]
    answer: str
    group: str
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A generated text and its cost in tokens."""

    text: str
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: Literal["stop", "length", "cancelled"]
    token_ids: tuple[int, ...] = field(default=())
