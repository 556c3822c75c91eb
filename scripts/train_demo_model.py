"""Train the small Mixture-of-Experts model that ``expertsmith demo`` ships.

What it does, in order:

1. reads the text that the running Python installation carries (``expertsmith.calibration.corpus``: standard library code,
   English technical prose, Unicode character records) and trains a byte-level BPE tokenizer of 2048 entries on its
   ``train`` split;
2. trains a stock ``Qwen3MoeForCausalLM`` (2.8M parameters: 4 layers, hidden size 128, 16 routed experts with the best 4
   used per token, no shared expert) from scratch, with Muon for the matrices and AdamW for embeddings, norms and
   routers;
3. writes config, bf16 weights, tokenizer and generation config to ``src/expertsmith/demo/model``.

The model exists to make expert pruning visible, so its experts should specialise by domain. Two auxiliary losses see to
that, both on the router probabilities of the whole mixed batch and both absent at inference, where the router decides
from the hidden state alone:

* the usual load-balancing loss, over the batch and never per sequence, so that a text may concentrate on few experts;
* minus the mutual information between the expert and the domain of the text, ``H(mean over domains) - mean H(domain)``,
  in each layer.

The default run makes 2000 steps of 4096 tokens (8.2M tokens) on one core. The shipped model took 40 minutes on a shared
x86 server core with bf16 instructions (3400 tokens/s); without such instructions expect two to three times as much. The
state is saved every 200 steps in the work folder, and a second call carries on from there. Run from the repository
root (with glibc, ``MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296`` in the environment saves up to
a third of the time, since large tensors are then reused instead of being mapped anew)::

    PYTHONPATH=src python scripts/train_demo_model.py
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from expertsmith.calibration import corpus

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "src" / "expertsmith" / "demo" / "model"
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCABULARY = 2048
CONTEXT = 512
SEQUENCE = 256
SEQUENCES_PER_DOMAIN = {"code": 7, "prose": 6, "unicode": 3}
MUON_LR, ADAM_LR = 0.02, 4e-3
WARMUP_STEPS = 50
BALANCE_EARLY, BALANCE_LATE = 0.02, 0.004
EVAL_EVERY, SAVE_EVERY = 100, 200


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices and for stacks of expert matrices.

    `torch.optim.Muon` takes two-dimensional parameters only, while the experts of a layer are one 3-D parameter.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalised(param.grad.lerp(state["momentum"], group["momentum"]))
                scale = max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Move the singular values of a matrix, or of a stack of them, towards one (quintic Newton-Schulz)."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def train_tokenizer(bytes_per_domain: int = 800_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the same amount of text from every domain."""

    def balanced_text() -> Iterator[str]:
        for domain in corpus.DOMAINS:
            yield from evenly_spread(corpus.documents(domain, "train"), bytes_per_domain)

    tokenizer = Tokenizer(models.BPE())
    # Single digits let the model count through consecutive code points.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(balanced_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def evenly_spread(texts: list[str], size: int) -> Iterator[str]:
    """Yield every n-th text so that about `size` characters come from the whole list."""
    step = max(1, sum(map(len, texts)) // size)
    yield from texts[::step]


def encode(tokenizer: PreTrainedTokenizerFast, domain: str, split: str) -> torch.Tensor:
    """Return all documents of a split as one row of tokens, each between its <|bos|> and <|eos|>."""
    tokens: list[int] = []
    for ids in tokenizer(corpus.documents(domain, split), verbose=False)["input_ids"]:
        tokens += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return torch.tensor(tokens)


def build_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=True,
        attn_implementation="sdpa",
        experts_implementation="eager",
    )
    return Qwen3MoeForCausalLM(config)


def build_optimizers(model: Qwen3MoeForCausalLM) -> list[torch.optim.Optimizer]:
    """Use Muon for the attention and expert matrices and AdamW for embeddings, norms and routers."""
    matrices, others = [], []
    for name, param in model.named_parameters():
        (matrices if param.ndim >= 2 and "embed" not in name and "gate.weight" not in name else others).append(param)
    return [
        Muon(matrices, lr=MUON_LR),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


class RouterRecorder:
    """Collects the router logits and chosen experts of every layer during a forward pass."""

    def __init__(self, model: Qwen3MoeForCausalLM):
        self.logits: list[torch.Tensor] = []
        self.chosen: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._record)

    def _record(self, module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        self.logits.append(output[0])
        self.chosen.append(output[2])

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.logits.clear()
        self.chosen.clear()


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    return -(probabilities * (probabilities + 1e-9).log()).sum(-1)


def routing_losses(routers: RouterRecorder, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the load-balancing loss and the mutual information of expert and domain, both as means over layers.

    `sizes` are the numbers of tokens of each domain, in the order in which they lie in the batch. The domains count
    alike whatever their sizes: with experts in proportion to the tokens, code would spread over more than half of them.
    """
    balance, information = [], []
    for logits, chosen in zip(routers.logits, routers.chosen, strict=True):
        probabilities = logits.float().softmax(-1)
        experts = probabilities.shape[-1]
        per_domain = torch.stack([part.mean(0) for part in probabilities.split(sizes)])
        loads = [torch.bincount(part.flatten(), minlength=experts) / part.numel() for part in chosen.split(sizes)]
        overall = per_domain.mean(0)
        balance.append(experts * (torch.stack(loads).mean(0) * overall).sum())
        information.append(entropy(overall) - entropy(per_domain).mean())
    return torch.stack(balance).mean(), torch.stack(information).mean()


def token_losses(model: Qwen3MoeForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss of each window."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
        # Window by window, so that the logits stay in the processor's cache: twice as fast as all at once.
        losses = [
            functional.cross_entropy(model.lm_head(states).float(), targets)
            for states, targets in zip(hidden, windows[:, 1:], strict=True)
        ]
    return torch.stack(losses)


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, routers: RouterRecorder, heldout: dict[str, torch.Tensor], most: int = 24) -> str:
    """Return the held-out loss of each domain and the share of its routing that its favourite half of experts takes."""
    report = []
    for domain, tokens in heldout.items():
        count = min(most, (len(tokens) - 1) // SEQUENCE)
        starts = torch.linspace(0, len(tokens) - SEQUENCE - 1, count).long()
        routers.clear()
        loss = token_losses(model, gather_windows(tokens, starts)).mean().item()
        loads = [torch.bincount(chosen.flatten(), minlength=16) / chosen.numel() for chosen in routers.chosen]
        half = torch.stack([load.sort(descending=True).values[: len(load) // 2].sum() for load in loads]).mean().item()
        report.append(f"{domain} {loss:.3f} (half {half:.0%})")
    return ", ".join(report)


def gather_windows(tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return tokens[starts[:, None] + torch.arange(SEQUENCE + 1)]


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up linearly, then follow a cosine down to two percent."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Train the model, carrying on from the work folder's checkpoint where there is one."""
    train_tokens = {domain: encode(tokenizer, domain, "train") for domain in corpus.DOMAINS}
    heldout = {domain: encode(tokenizer, domain, "heldout") for domain in corpus.DOMAINS}
    print("train tokens:", {domain: len(tokens) for domain, tokens in train_tokens.items()}, flush=True)

    torch.manual_seed(arguments.seed)
    model = build_model()
    routers = RouterRecorder(model)
    optimizers = build_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    print("parameters:", sum(param.numel() for param in model.parameters()), flush=True)

    first = 0
    checkpoint = arguments.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        print(f"carrying on from step {first}", flush=True)

    sizes = [count * SEQUENCE for count in SEQUENCES_PER_DOMAIN.values()]
    started, running = time.monotonic(), 0.0
    for step in range(first, arguments.steps):
        # Seeded by the step, so that a resumed run sees the batches which an uninterrupted one would have seen.
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        batch = torch.cat(
            [
                gather_windows(
                    train_tokens[domain],
                    torch.randint(len(train_tokens[domain]) - SEQUENCE, (count,), generator=generator),
                )
                for domain, count in SEQUENCES_PER_DOMAIN.items()
            ]
        )
        factor = learning_rate_factor(step, arguments.steps)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

        routers.clear()
        loss = token_losses(model, batch).mean()
        balance, information = routing_losses(routers, sizes)
        balance_weight = BALANCE_EARLY if step < arguments.steps // 5 else BALANCE_LATE
        total = loss + balance_weight * balance - arguments.information_weight * information
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == first else 0.95 * running + 0.05 * loss.item()

        done = step + 1
        if done % EVAL_EVERY == 0 or done == arguments.steps:
            model.eval()
            speed = (done - first) * sum(sizes) / (time.monotonic() - started)
            print(
                f"step {done}/{arguments.steps} train {running:.3f} balance {balance.item():.3f} "
                f"information {information.item():.3f} {speed:.0f} tokens/s | heldout "
                + evaluate(model, routers, heldout, most=10_000 if done == arguments.steps else 24),
                flush=True,
            )
            model.train()
        if done % SAVE_EVERY == 0 or done == arguments.steps:
            state = {
                "step": done,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            # Written aside and renamed, so that an interruption never leaves half a checkpoint.
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    return model.eval()


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bf16 with its tokenizer and print the size of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=True, temperature=0.8, top_p=0.95
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.2f} MB)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder to write the model to")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "demo_train", help="checkpoints")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--information-weight", type=float, default=0.1, help="weight of the mutual information")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    model = train(arguments, tokenizer)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
