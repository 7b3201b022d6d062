"""Tasks that put a question and score the whole answer; decoding such answers, and which of them are right.

    batch = task.sample(1000, torch.Generator().manual_seed(0))             # an AnswerTask: addition.py, cyclic.py
    right = answers.exact(model, task, batch)                               # decoded token by token: bool [1000]
    right = task.whole(model(batch.tokens).logits.argmax(dim=-1), batch)    # the same for a causal model, in one pass

A causal model that answers greedily is exact on a row just when each of its predictions is right with the true answer so
far as input: up to the first error both read the same. `exact` takes nothing for granted and decodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tasks


@dataclass(frozen=True, kw_only=True)
class AnswerTask(tasks.Task, abstract=True):
    """A question of P tokens and an answer of A tokens, each scored, with the true ones before it given as input.

        q1 .. qP a1 .. aA        read all but aA; at qP predict a1, at a1 predict a2, ...

    A subclass defines `prompt_len` and `choices`, draws rows with `build`, and answers a prompt in `_solve`. What a mistake
    costs depends on the place, so beside `chance` per token stands `chance_whole` for all of an answer.
    """

    @property
    def prompt_len(self) -> int:
        """P: tokens of the question."""
        raise NotImplementedError(f"{type(self).__name__} does not define prompt_len")

    @property
    def choices(self) -> tuple[int, ...]:
        """How many different ids occur at each of the A places of an answer."""
        raise NotImplementedError(f"{type(self).__name__} does not define choices")

    def _solve(self, prompts: Tensor) -> Tensor:
        """int64 [n, P] -> int64 [n, A]: the answers."""
        raise NotImplementedError(f"{type(self).__name__} does not define _solve")

    @property
    def answer_len(self) -> int:
        """A: tokens of the answer."""
        return len(self.choices)

    @property
    def seq_len(self) -> int:
        """P + A - 1 tokens: the last one of the answer is predicted and never read."""
        return self.prompt_len + self.answer_len - 1

    @property
    def scored_per_row(self) -> int:
        return self.answer_len

    @property
    def chance(self) -> float:
        """Mean over the places of an answer of 1 / ids that occur there."""
        return sum(1 / count for count in self.choices) / self.answer_len

    @property
    def chance_whole(self) -> float:
        """Chance that a guess among the ids of each place is right at all of them."""
        return 1 / math.prod(self.choices)

    def build(self, prompts: Tensor, answers: Tensor) -> tasks.Batch:
        """Rows of prompts int64 [..., P] and their answers int64 [..., A], on whatever device those are."""
        row = torch.cat([prompts, answers], dim=-1)
        targets = row[..., 1:].clone()
        targets[..., : self.prompt_len - 1] = tasks.IGNORE
        return tasks.Batch(row[..., :-1].contiguous(), targets)

    def prompts(self, batch: tasks.Batch) -> Tensor:
        """int64 [n, P]: what is asked."""
        return batch.tokens[..., : self.prompt_len]

    def answers(self, aligned: Tensor) -> Tensor:
        """int64 [..., A]: the places of the answer, of what is aligned with targets, int64 [..., P + A - 1]."""
        return aligned[..., self.prompt_len - 1 :]

    def whole(self, predictions: Tensor, batch: tasks.Batch) -> Tensor:
        """bool [..., n]: whether every token of each answer is right.

        predictions: int64 [..., n, P + A - 1] aligned with the targets, or [..., n, A], the answers alone; dimensions in
        front of those, such as the members of an ensemble, stay. ValueError for any other shape.
        """
        n, length = batch.tokens.shape[-2:]
        if predictions.shape[-2:] not in ((n, length), (n, self.answer_len)):
            shapes = f"[..., {n}, {length}] or [..., {n}, {self.answer_len}]"
            raise ValueError(f"predictions: shape {list(predictions.shape)}, needs {shapes} for {n} rows")
        given = self.answers(predictions) if predictions.shape[-1] == length else predictions
        return (given == self.answers(batch.targets).to(given.device)).all(dim=-1)

    def oracle(self, batch: tasks.Batch) -> Tensor:
        """The answer, from the question alone."""
        predictions = torch.full_like(batch.tokens, tasks.IGNORE)
        predictions[..., self.prompt_len - 1 :] = self._solve(self.prompts(batch))
        return predictions


@torch.no_grad()
def decode(model: nn.Module, prompts: Tensor, length: int, *, batch_size: int = 8192) -> Tensor:
    """int64 [n, length] on the CPU: what a model writes after prompts int64 [n, P], greedily and token by token.

    model: anything called as model(tokens) that returns `.logits` [B, T, vocab]. Each token decoded is input for the next;
    nothing here knows the task, and all tokens are read again at every step, so any such model will do. It runs in
    evaluation mode, on its own device, in its own precision.
    ValueError for prompts of another shape, or a `length` or `batch_size` below 1.
    """
    if prompts.dim() != 2 or 0 in prompts.shape or prompts.dtype != torch.int64:
        raise ValueError(f"prompts: {prompts.dtype} {list(prompts.shape)}, needs int64 [n, P] with n and P at least 1")
    for name, value in (("length", length), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {value!r}: needs an integer of at least 1")
    device = next((p.device for p in model.parameters()), prompts.device)
    training, written = model.training, []
    model.eval()
    try:
        for part in prompts.to(device).split(batch_size):
            tokens = part
            for _ in range(length):
                following = model(tokens).logits[:, -1].argmax(dim=-1, keepdim=True)
                tokens = torch.cat([tokens, following], dim=1)
            written.append(tokens[:, prompts.shape[1] :].cpu())
    finally:
        model.train(training)
    return torch.cat(written)


def exact(model: nn.Module, task: AnswerTask, batch: tasks.Batch, *, batch_size: int = 8192) -> Tensor:
    """bool [n] on the CPU: whether the model, asked for the rows of `batch`, writes each whole answer without an error."""
    return task.whole(decode(model, task.prompts(batch), task.answer_len, batch_size=batch_size), batch)
