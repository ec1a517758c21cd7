"""What is learned: how an example becomes tokens and gold, and what the loss of a batch is."""

from luthier.core.catalog import Catalog
from luthier.training.objectives.part import Objective as Objective

OBJECTIVES: "Catalog[Objective]" = Catalog(
    "objective",
    {
        "pretrain": ".pretrain:Pretrain",
        "sft": ".sft:SFT",
        "dpo": ".dpo:DPO",
        "orpo": ".orpo:ORPO",
        "simpo": ".simpo:SimPO",
        "kto": ".kto:KTO",
        "reward": ".reward:Reward",
        "classify": ".classify:Classify",
        "regress": ".regress:Regress",
        "seq2seq": ".seq2seq:Seq2Seq",
        "distil": ".distil:Distil",
        "grpo": ".grpo:GRPO",
    },
    __name__,
)
