"""The oracle: the same training in plain PyTorch, on one process, without DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from toy import SEED, batch_of, count_targets, optim_config, toy_config, windows_in_order

from gptj_train import GPTJForCausalLM
from gptj_train.model.loss import IGNORE, next_token_targets
from gptj_train.training.schedule import lr_at


def train(dtype: torch.dtype, steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final master weights of AdamW on fp32 masters with ``dtype`` compute."""
    torch.manual_seed(SEED)
    optim = optim_config()
    computing = GPTJForCausalLM(toy_config()).to(dtype).train()
    masters = {name: parameter.detach().float().clone() for name, parameter in computing.named_parameters()}
    decayed = [master for master in masters.values() if master.dim() > 1]
    others = [master for master in masters.values() if master.dim() == 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    losses, norms = [], []
    for step, windows in enumerate(windows_in_order(0, steps)):
        batches = [batch_of([window]) for window in windows]
        total = sum(count_targets(batch) for batch in batches)
        gradients = {name: torch.zeros_like(master) for name, master in masters.items()}
        loss = 0.0
        for batch in batches:
            computing.zero_grad()
            part = computing(**batch, use_cache=False, num_items_in_batch=total).loss
            part.backward()
            loss += part.item()
            for name, parameter in computing.named_parameters():
                gradients[name] += parameter.grad.float()
        for name, master in masters.items():
            master.grad = gradients[name]
        losses.append(loss)
        norms.append(clip_grad_norm_(masters.values(), optim.clip_norm).item())
        for group in adamw.param_groups:
            group["lr"] = lr_at(step, steps, optim)
        adamw.step()
        with torch.no_grad():
            for name, parameter in computing.named_parameters():
                parameter.copy_(masters[name])
    return losses, norms, masters


def train_adapters(model: Any, steps: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a Transformers model whose trainable parameters AdamW moves, in fp32.

    Transformers has no packed batches: the loss is taken from our own model's definition of targets.
    """
    optim = optim_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    losses, norms = [], []
    for step, windows in enumerate(windows_in_order(0, steps)):
        batches = [batch_of([window]) for window in windows]
        total = sum(count_targets(batch) for batch in batches)
        adamw.zero_grad()
        loss = sum(_packed_loss(model, batch) for batch in batches) / total
        loss.backward()
        losses.append(loss.item())
        norms.append(clip_grad_norm_(trained, optim.clip_norm).item())
        for group in adamw.param_groups:
            group["lr"] = lr_at(step, steps, optim)
        adamw.step()
    return losses, norms


def _packed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Summed loss of documents that are shown to the model one by one."""
    targets = next_token_targets(batch["labels"], batch["document_ids"])
    loss = torch.zeros(())
    for ids, wanted, documents in zip(batch["input_ids"], targets, batch["document_ids"], strict=True):
        for document in documents.unique():
            own = documents == document
            logits = model(input_ids=ids[own][None]).logits[0]
            loss = loss + cross_entropy(logits, wanted[own], ignore_index=IGNORE, reduction="sum")
    return loss
