"""What of LGCD is studied: the paper's own settings as a preset, its ablations and its figures (arXiv 2604.05365)."""

from __future__ import annotations

from trainables.interface import Figure, Variant
from trainables.models.lgcd.config import GUIDANCE, PREDICTS

PRESETS = {
    # As literally as the text allows. What it leaves open, and what is not literal all the same: docs/models.md.
    "paper": {
        "encoder_sequences": "per_domain",  # eq. 1
        "id_start": "random",  # eq. 1
        "item_fusion": "shared",  # eq. 3
        "encoder_beta2": 0.999,  # Adam as its paper has it; LGCD names no other
        "retrieval": "per_user",  # eqs. 5-6
        "rows": "last",  # 3.2: the last item of the target domain, and what precedes it
        "condition_from": "source",  # eq. 8
        "condition_tokens": 1,  # eq. 13
        "schedule": "linear_root",  # eq. 9
        "loss_norm": "sum",  # eqs. 17, 21, 22
        "expert_start": "random",  # eq. 24
        "align_on": "single",  # eq. 27
        "guesser_start": "gaussian",  # Table 3, w/o guesser
        "train_reverse": "chain",  # eqs. 19, 21
        "directions": "both",  # eq. 18
        "dropout": 0.0,
        "epochs": 5,  # of both directions; the paper is silent
        "keep": "last",
    }
}
ABLATIONS = {  # Table 3
    "wo_diffusion": Variant(
        config={"diffusion": False}, presets={"paper": {"diffusion": False, "expert": "none"}}
    ),  # the paper predicts with h_cond itself
    "wo_overlap_diffusion": Variant(
        config={"overlap_diffusion": False}, presets={"paper": {"overlap_rows": False}}
    ),  # 0.09 of 0.28 in print is below w/o diffusion: real users have left L_rec too
    "wo_pseudo_diffusion": Variant(config={"pseudo_diffusion": False}),
    "wo_alignment": Variant(config={"alignment": False}),
    "wo_guesser": Variant(config={"guesser": False}),
    "wo_moe": Variant(config={"moe": False}),
    "wo_cyclic": Variant(config={"cyclic": False}),
}
FIGURES = {
    "pseudo_items": Figure(
        name="figure_3a_pseudo_items", title="NDCG@10 over pseudo-items per user n_K (LGCD Figure 3)",
        label="Pseudo-items per user n_K",
    ),
    "steps": Figure(
        name="figure_3b_steps", title="NDCG@10 over diffusion steps T (LGCD Figure 3)", label="Diffusion steps T"
    ),
    "start_ratio": Figure(
        name="figure_3c_start_ratio", title="NDCG@10 over the start ratio λ (LGCD Figure 3)", label="Start ratio λ"
    ),
    "guidance": Figure(
        name="figure_4_guidance", title="Ways to guide the diffusion (LGCD Figure 4)", label="Guidance", order=GUIDANCE
    ),
    "predicts": Figure(
        name="figure_5_predicts", title="Predicting the feature or the noise (LGCD Figure 5)", label="Prediction target",
        order=PREDICTS,
    ),
    "overlap_ratio": Figure(
        name="figure_6_overlap_ratio", title="NDCG@10 over the overlap ratio (LGCD Figure 6)", label="Overlap ratio"
    ),
    "sampler_steps": Figure(
        name="sampler_steps", title="Quality against cost of the strided sampler", label="Sampler steps S (0: all)",
        metrics=("val_ndcg10", "val_seconds"),
    ),
}  # fmt: skip
