# SPDX-License-Identifier: Apache-2.0
"""The model that lmms-eval calls ``vtprune``; its registry finds it by this package's entry point.

    lmms_eval --model vtprune --model_args pretrained=pocket-llava,method=idpruner,keep=1/9 --tasks NAME

``method=dense`` (the default) prunes nothing; everything else in ``--model_args`` is an option of the method.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..api import using
from ..errors import ConfigError
from ..models import find_family
from ..models.loading import load
from . import runner
from .controls import CONTROLS, prepare
from .lmms import MAX_NEW_TOKENS, messages_of, stopper
from .sweep import launched
from .tasks import Example


class VTPrune(lmms):
    """A pruned model behind lmms-eval's interface for chats.

    Parameters
    ----------
    pretrained
        As for `vtprune.load`.
    method, keep
        As on the command line: ``idpruner``, ``norm+idpruner``; ``1/9``, ``0.25``, ``64t``.
    batch_size
        Questions that are answered together.
    device, dtype
        As for `vtprune.load`.
    max_batch_size, max_new_tokens
        The first is lmms-eval's own and not used; the second stands in where a task does not say.
    **options
        Of the method.

    Raises
    ------
    ConfigError
        A method, budget or option cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "pocket-llava",
        method: str = "dense",
        keep: str | float | int = "1/4",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **options: Any,
    ) -> None:
        super().__init__()
        if method in CONTROLS and method != "dense":
            raise ConfigError(f"method={method!r} is a control of our own runner; use `vtprune eval --task lmms:NAME`")
        self._rank, self._world_size = launched()
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{self._rank % torch.cuda.device_count()}"
        self.method = runner.Method(method, method, options)
        self.keep = f"{keep:g}" if isinstance(keep, float) else f"{keep}t" if isinstance(keep, int) else keep
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self.max_new_tokens = int(max_new_tokens)
        if method != "dense":
            self.method.config(self.keep)  # before anything is loaded
        self.model, self.processor = load(pretrained, device=device, dtype=dtype)
        self.family = find_family(self.model)
        self.config = self.model.config

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests in their order; those with equal settings together."""
        with (
            using(self.model, self.method.config(self.keep))
            if self.method.name != "dense"
            else contextlib.nullcontext()
        ):
            bar = tqdm(total=len(requests), disable=self.rank != 0, desc=f"vtprune {self.method.name}")
            found: list[GenerationResult] = []
            settings = [json.dumps(request.args[2], sort_keys=True, default=str) for request in requests]
            places = itertools.groupby(range(len(requests)), key=settings.__getitem__)
            for group in (list(group) for _, group in places):
                for start in range(0, len(group), self.batch_size):
                    part = [requests[at] for at in group[start : start + self.batch_size]]
                    found += self._answer(part)
                    bar.update(len(part))
            bar.close()
        return found

    def _answer(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        examples = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            chat = doc_to_messages(self.task_dict[task][split][doc_id])
            examples.append(Example(task, str(doc_id), "all", messages_of(chat), ""))
        options = dict(requests[0].args[2])
        until = options.pop("until", [])
        most = int(options.pop("max_new_tokens", None) or self.max_new_tokens)
        if options.get("do_sample") or float(options.get("temperature") or 0) > 0:
            raise ConfigError(f"{requests[0].args[4]} samples ({options}); answers here are greedy, give temperature=0")
        inputs = prepare(self.family, self.processor, examples)
        texts = runner.generate(self.model, self.processor, inputs, most)
        cut = stopper([until] if isinstance(until, str) else until)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        lens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return [GenerationResult(cut(text), TokenCounts(output_tokens=n)) for text, n in zip(texts, lens, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        """Not there: tasks that compare likelihoods are few, and none of them is about what pruning loses."""
        raise NotImplementedError("vtprune answers generate_until tasks; this one asks for likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        """Not there."""
        raise NotImplementedError("vtprune answers generate_until tasks; this one has several rounds")
