"""BibTeX of the papers that define what a study counts. Which of them are due depends on what was counted.

It knows parts of a summary.json by whether they are there, and no number of theirs.
"""

from __future__ import annotations

from outliers.results.schema import Advice, StudySummary

LLM_INT8 = """@inproceedings{dettmers2022llmint8,
  title = {{LLM.int8()}: 8-bit Matrix Multiplication for Transformers at Scale},
  author = {Dettmers, Tim and Lewis, Mike and Belkada, Younes and Zettlemoyer, Luke},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {35},
  year = {2022},
  eprint = {2208.07339},
  archivePrefix = {arXiv}
}"""
"""What a systematic outlier feature is."""
MEAN_OF_LARGEST = """@inproceedings{bondarenko2023quantizable,
  title = {Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing},
  author = {Bondarenko, Yelysei and Nagel, Markus and Blankevoort, Tijmen},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {36},
  year = {2023},
  eprint = {2306.12929},
  archivePrefix = {arXiv}
}"""
"""The mean over sequences of the largest magnitude in each (`mean_inf_norm`)."""
MASSIVE = """@inproceedings{sun2024massive,
  title = {Massive Activations in Large Language Models},
  author = {Sun, Mingjie and Chen, Xinlei and Kolter, J. Zico and Liu, Zhuang},
  booktitle = {First Conference on Language Modeling},
  year = {2024},
  eprint = {2402.17762},
  archivePrefix = {arXiv}
}"""
"""What a massive activation is."""
SUPER_EXPERTS = """@article{su2025superexperts,
  title = {Unveiling Super Experts in Mixture-of-Experts Large Language Models},
  author = {Su, Zunhai and Li, Qingyuan and Zhang, Hao and Qian, YuLei and Xie, Yuchen and Yuan, Kehong},
  journal = {arXiv preprint arXiv:2507.23279},
  year = {2025}
}"""
"""What a super expert is."""
SUPER_WEIGHTS = """@article{yu2024superweight,
  title = {The Super Weight in Large Language Models},
  author = {Yu, Mengxia and Wang, De and Shan, Qi and Reed, Colorado J. and Wan, Alvin},
  journal = {arXiv preprint arXiv:2411.07191},
  year = {2024}
}"""
"""What a super weight is."""


def citations(summary: StudySummary, advice: Advice | None = None) -> tuple[str, ...]:
    """The entries that a study rests on, the first that of its criteria. advice: of a probe, which may name super weights."""
    weights = advice is not None and any(cause.kind == "weight" for cause in advice.causes)
    return (
        LLM_INT8,
        *([MEAN_OF_LARGEST] if any(row.mean_inf_norm is not None for row in summary.layers) else []),
        *([MASSIVE] if summary.massive is not None else []),
        *([SUPER_EXPERTS] if summary.experts is not None and summary.experts.super_experts is not None else []),
        *([SUPER_WEIGHTS] if weights else []),
    )
