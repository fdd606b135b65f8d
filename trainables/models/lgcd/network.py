"""LGCD's network: condition, denoiser, guesser and fusion by experts (arXiv 2604.05365, eqs. 8, 12-16, 18-20, 23-24).

Shapes: B batch of rows, C condition tokens, D vector width, E experts, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from trainables.diffusion import Diffusion, Noise, normal_like, timestep_embedding, variances
from trainables.models.lgcd.config import WIDTH, Config
from trainables.sequences.blocks import Dropout

Predicted = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, D], t [B]) -> prediction [B, D], under a condition that is given already."""


@dataclass(frozen=True)
class Condition:
    """What the reverse process knows of a user."""

    tokens: Tensor  # [B, C, D]: ID part and text part of h_cond, or one token
    hidden: Tensor  # bool [B, C], tokens that a row does not have
    whole: Tensor  # h_cond, [B, D] (eq. 8)


class Conditioner(nn.Module):
    """f_fusion (eq. 8): h_cond from the ID and the text representation of what is visible of a user."""

    def __init__(self, config: Config, fusion: nn.Linear) -> None:
        super().__init__()
        self.guidance, self.tokens = config.guidance, config.condition_tokens
        self.id_map = nn.Linear(WIDTH, WIDTH)  # its two halves start as pretraining left them
        self.text_map = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.id_map.weight.copy_(fusion.weight[:, :WIDTH])
            self.id_map.bias.copy_(fusion.bias)
            self.text_map.weight.copy_(fusion.weight[:, WIDTH:])
        self.dropout = Dropout(config.dropout)

    def forward(self, id_BD: Tensor, text_BD: Tensor, real_B: Tensor) -> Condition:
        """[B, D] each; a row that is not real has no text part."""
        id_part, text_part = self.dropout(self.id_map(id_BD)), self.dropout(self.text_map(text_BD))
        if self.guidance == "id":
            return _one_token(id_part)
        if self.guidance == "text":
            return _one_token(text_part + self.id_map.bias)
        if self.tokens == 1:
            return _one_token(id_part + text_part)
        lacking = ~real_B
        tokens = torch.stack([id_part, text_part], dim=1)
        return Condition(tokens, torch.stack([torch.zeros_like(lacking), lacking], dim=1), id_part + text_part)


def _one_token(whole_BD: Tensor) -> Condition:
    hidden = torch.zeros(len(whole_BD), 1, dtype=torch.bool, device=whole_BD.device)
    return Condition(whole_BD[:, None], hidden, whole_BD)


# --- denoiser -----------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """The noisy feature reads the condition's tokens (eq. 13): its ID and text part.

    Two are (ours): over eq. 13's one token, h_cond, a softmax weighs nothing. What is read is then the same for every x_t.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(WIDTH, 2 * WIDTH)

    def given(self, condition: Condition) -> Predicted:
        """Return what x_t and the step read of one condition; a chain of many steps maps its tokens once."""
        B, C, _ = condition.tokens.shape
        key_BCHK, value_BCHK = self.key_value(condition.tokens).view(B, C, 2, self.heads, -1).unbind(dim=2)
        if C == 1:
            read_BD: Tensor = self.out(value_BCHK.reshape(B, WIDTH))
            return lambda x_BD, t_B: read_BD

        def attend(x_BD: Tensor, t_B: Tensor) -> Tensor:
            query_B1HK = self.query(x_BD + timestep_embedding(t_B, WIDTH)).view(B, 1, self.heads, -1)  # (12)
            # Written out: the fused attention of torch takes 3 times as long for two tokens.
            logits_BCH = (query_B1HK * key_BCHK).sum(dim=-1) / math.sqrt(WIDTH // self.heads)
            weight_BCH = logits_BCH.masked_fill(condition.hidden[:, :, None], -torch.inf).softmax(dim=1)
            out: Tensor = self.out((weight_BCH[..., None] * value_BCHK).sum(dim=1).reshape(B, WIDTH))
            return out

        return attend


class Denoiser(nn.Module):
    """f(x_t, t, c) of eqs. 12-16; the caller says what it predicts: x_0, or the noise."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        attends = config.guidance in ("cross_attention", "id", "text")
        self.attention = CrossAttention(config.heads) if attends else None
        self.linear = None if attends else nn.Linear(WIDTH, WIDTH)
        self.map = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), Dropout(config.dropout), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_BD: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """[B, D] -> [B, D]."""
        return self.given(condition)(x_BD, t_B)

    def given(self, condition: Condition) -> Predicted:
        """Return the denoiser under one condition."""
        read = self._reader(condition)

        def denoise(x_BD: Tensor, t_B: Tensor) -> Tensor:
            x = read(x_BD, t_B) + x_BD  # (14)
            out: Tensor = x + self.map(x)  # (15)
            return out

        return denoise

    def _reader(self, condition: Condition) -> Predicted:
        """What the noisy feature x_t and the step read of the condition (eqs. 12-13)."""
        if self.attention is None:  # the noisy feature comes in at the residual alone, as it does beside the attention
            assert self.linear is not None
            told_BD = self.linear(condition.whole)
            return lambda x_BD, t_B: timestep_embedding(t_B, WIDTH) + told_BD
        return self.attention.given(condition)


# --- fusion by experts --------------------------------------------------------------------------------------------


class LinearExperts(nn.Module):
    """A linear map of [h_cond, h_rev] for each expert.

    `identity`: they start as the identity on the condition (ours): training starts from what the encoders recommend.
    """

    def __init__(self, experts: int, start: str) -> None:
        super().__init__()
        if start == "identity":
            identity = torch.cat([torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)], dim=1)
            self.weight = nn.Parameter(identity + 0.01 * torch.randn(experts, WIDTH, 2 * WIDTH))
            self.bias = nn.Parameter(torch.zeros(experts, WIDTH))
        else:
            self.weight, self.bias = _random_map(experts, 2 * WIDTH, WIDTH)

    def forward(self, both_BK: Tensor) -> Tensor:
        """[B, 2D] -> [B, E, D]."""
        answer = functional.linear(both_BK, self.weight.flatten(0, 1), self.bias.flatten())
        return answer.view(len(both_BK), -1, WIDTH)


class MlpExperts(nn.Module):
    """Two linear maps with a GELU between them for each expert."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.inner, self.inner_bias = _random_map(experts, 2 * WIDTH, WIDTH)
        self.outer, self.outer_bias = _random_map(experts, WIDTH, WIDTH)

    def forward(self, both_BK: Tensor) -> Tensor:
        """[B, 2D] -> [B, E, D]."""
        inner = functional.linear(both_BK, self.inner.flatten(0, 1), self.inner_bias.flatten())
        inner_BED = functional.gelu(inner.view(len(both_BK), -1, WIDTH))
        return torch.einsum("bei,eoi->beo", inner_BED, self.outer) + self.outer_bias


def _random_map(experts: int, inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights and biases as those of `nn.Linear` start."""
    bound = 1 / math.sqrt(inputs)
    weight, bias = torch.empty(experts, outputs, inputs), torch.empty(experts, outputs)
    return nn.Parameter(weight.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))


class Mixture(nn.Module):
    """Gate on the condition, experts on condition and generated feature (eqs. 23-24)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, active = (config.experts, config.active_experts) if config.moe else (1, 0)
        self.gate = nn.Linear(WIDTH, experts)
        self.experts = MlpExperts(experts) if config.expert == "mlp" else LinearExperts(experts, config.expert_start)
        self.active = active or experts

    def forward(self, condition_BD: Tensor, generated_BD: Tensor | None) -> Tensor:
        """h_final, [B, D]; without a generated feature the experts read the condition alone."""
        logits_BE = self.gate(condition_BD)
        if self.active < logits_BE.shape[1]:
            least = logits_BE.topk(self.active, dim=1).values[:, -1:]
            logits_BE = logits_BE.masked_fill(logits_BE < least, -torch.inf)
        generated_BD = 0 * condition_BD if generated_BD is None else generated_BD
        answer_BED = self.experts(torch.cat([condition_BD, generated_BD], dim=1))
        final: Tensor = (logits_BE.softmax(dim=1)[:, :, None] * answer_BED).sum(dim=1)
        return final


class NoFusion(nn.Module):
    """Recommends with the generated feature itself, or with the condition where nothing is generated."""

    def forward(self, condition_BD: Tensor, generated_BD: Tensor | None) -> Tensor:
        """[B, D] -> [B, D]."""
        return condition_BD if generated_BD is None else generated_BD


# --- the whole ----------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """All that a trial trains. Directions (`way` 0 is the cell's) have f_fusion and guesser apart, and share the rest."""

    def __init__(self, config: Config, fusions: Sequence[nn.Linear]) -> None:
        """`fusions`: the pretrained fusion of each direction's source domain."""
        super().__init__()
        self.config = config
        self.conditioners = nn.ModuleList(Conditioner(config, fusion) for fusion in fusions)
        self.denoiser = Denoiser(config)
        self.guessers = nn.ModuleList(_guesser() for _ in fusions)
        self.fusion = NoFusion() if config.expert == "none" else Mixture(config)
        self.diffusion = Diffusion(variances(config.steps, config.variance_start, config.variance_end, config.schedule))
        # Where the reverse process starts: lambda T, or T where there is no guess to start from.
        self.first = max(1, round(config.start_ratio * config.steps)) if config.guesser else config.steps
        self.from_noise = not config.guesser and config.guesser_start == "gaussian"

    def condition(self, id_BD: Tensor, text_BD: Tensor, real_B: Tensor, way: int = 0) -> Condition:
        """h_cond and its parts from the representations of the visible history (eq. 8)."""
        condition: Condition = self.conditioners[way](id_BD, text_BD, real_B)
        return condition

    def guess(self, condition: Condition, way: int = 0) -> Tensor:
        """h_init (eq. 18), [B, D]; 0 without guesser, so that noise alone is left of it at T."""
        whole = condition.whole
        guessed: Tensor = self.guessers[way](whole) if self.config.guesser else torch.zeros_like(whole)
        return guessed

    def cleaner(self, condition: Condition) -> Predicted:
        """Return the prediction of x_0 (eq. 16), whatever the denoiser predicts; guided where the config says so."""
        predict = self.denoiser.given(condition)
        if self.config.guidance == "cfg" and not self.training:
            predict = self._guided(predict, condition)
        if self.config.predicts == "x0":
            return predict
        return lambda x_BD, t_B: self.diffusion.clean(x_BD, t_B, predict(x_BD, t_B))

    def _guided(self, predict: Predicted, condition: Condition) -> Predicted:
        """Go past the conditioned prediction, away from the one without a condition (Ho & Salimans 2022)."""
        weight = self.config.guidance_weight
        without = self.denoiser.given(Condition(condition.tokens, condition.hidden, torch.zeros_like(condition.whole)))

        def guided(x_BD: Tensor, t_B: Tensor) -> Tensor:
            predicted = predict(x_BD, t_B)
            return predicted + weight * (predicted - without(x_BD, t_B))

        return guided

    def start(self, guess_BD: Tensor, generator: Noise) -> Tensor:
        """Where the reverse process starts, [B, D]: the guess noised to lambda T; without guesser noise alone, at T."""
        noise = normal_like(guess_BD, generator)
        t_B = torch.full((len(guess_BD),), self.first, device=guess_BD.device)
        return noise if self.from_noise else self.diffusion.noised(guess_BD, t_B, noise)

    def reverse(self, guess_BD: Tensor, condition: Condition, generator: Noise) -> Tensor:
        """h_rev: from the noised guess down to 0 (eqs. 18-20). In training the last step alone has a gradient (ours)."""
        clean = self.cleaner(condition)
        x = self.start(guess_BD.detach(), generator)

        def denoise(x_BD: Tensor, t_B: Tensor, _: Tensor | None) -> Tensor:
            with torch.set_grad_enabled(torch.is_grad_enabled() and int(t_B[0]) == 1):
                return clean(x_BD, t_B)

        if self.config.sampler_steps:
            return self.diffusion.strided(denoise, None, x, self.first, self.config.sampler_steps)
        return self.diffusion.generate(denoise, None, x, generator, first=self.first)

    def final(self, condition: Condition, generated_BD: Tensor | None) -> Tensor:
        """h_final, [B, D] (eq. 24)."""
        final: Tensor = self.fusion(condition.whole, generated_BD)
        return final

    @torch.no_grad()
    def recommend(self, id_BD: Tensor, text_BD: Tensor, generator: Noise) -> Tensor:
        """h_final of users of the cell's direction, [B, D]."""
        condition = self.condition(id_BD, text_BD, torch.ones(len(id_BD), dtype=torch.bool, device=id_BD.device))
        if not self.config.diffusion:
            return self.final(condition, None)
        return self.final(condition, self.reverse(self.guess(condition), condition, generator))


def _guesser() -> nn.Module:
    """G of eq. 18."""
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
