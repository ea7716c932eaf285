"""A small mixture of experts that is trained before it is used, so that its routing has learned something.

python examples/trained_moe.py                       train; the loss beside what the language allows
effcc trace-experts examples/trained_moe.py -n 32    train, and record the experts that fresh text goes to
effcc place-experts trace.npz --ranks 4              place them

The language has topics: each has words of its own, and which word follows depends on the word before; some words are
common to all topics. Training takes less than a minute on one core.
"""

import time
from dataclasses import dataclass

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

TOPICS, WORDS, COMMON = 8, 12, 16
BATCH, SEQUENCE, STEPS = 32, 32, 600
CONFIG = Qwen3MoeConfig(
    vocab_size=TOPICS * WORDS + COMMON, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16,
    num_experts_per_tok=2, max_position_embeddings=SEQUENCE, output_router_logits=True, router_aux_loss_coef=0.02,
    use_cache=False, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@dataclass
class Language:
    """``following``: [topics, words, words] probabilities of the next word."""

    following: torch.Tensor

    @classmethod
    def draw(cls, seed: int = 0) -> "Language":
        """Successors from Dirichlet distributions; three words in ten are common ones."""
        generator = torch.Generator().manual_seed(seed)
        size = CONFIG.vocab_size
        # a Dirichlet draw with small concentration: normalised powers of uniform numbers
        weight = torch.rand(TOPICS, size, size, generator=generator) ** 8
        common = torch.arange(size) >= TOPICS * WORDS
        own = torch.arange(size)[None] // WORDS == torch.arange(TOPICS)[:, None]
        following = torch.zeros_like(weight)
        for share, words in ((0.7, own), (0.3, common[None].expand(TOPICS, -1))):
            part = weight * words[:, None, :]
            following += share * part / part.sum(-1, keepdim=True)
        return cls(following)

    def text(self, sequences: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        """[sequences, SEQUENCE] words, a topic each, and the mean surprise (nats a word) of one who knows the topic."""
        topic = torch.randint(TOPICS, (sequences,), generator=generator)
        words = [topic * WORDS + torch.randint(WORDS, (sequences,), generator=generator)]
        surprise = []
        for _ in range(SEQUENCE - 1):
            chances = self.following[topic, words[-1]]
            words.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
            surprise.append(-chances.gather(1, words[-1][:, None]).log().mean())
        return torch.stack(words, dim=1), float(torch.stack(surprise).mean())


LANGUAGE = Language.draw()
FRESH = torch.Generator().manual_seed(12345)


def model(steps: int = STEPS, show: bool = False) -> Qwen3MoeForCausalLM:
    """Train from random weights, equal ones each time."""
    torch.manual_seed(0)
    network = Qwen3MoeForCausalLM(CONFIG).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        words, surprise = LANGUAGE.text(BATCH, generator)
        outputs = network(input_ids=words, labels=words)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if show and (number % 100 == 0 or number == steps - 1):
            loss = outputs.loss.item() - CONFIG.router_aux_loss_coef * outputs.aux_loss.item()
            print(f"step {number:3d}  loss {loss:.3f}  of one who knows the topic {surprise:.3f}", flush=True)
    return network.eval()


def example_inputs() -> dict[str, torch.Tensor]:
    """Text that the model has not seen; other text at each call."""
    return {"input_ids": LANGUAGE.text(64, FRESH)[0]}


if __name__ == "__main__":
    begin = time.perf_counter()
    model(show=True)
    print(f"{time.perf_counter() - begin:.1f} s")
