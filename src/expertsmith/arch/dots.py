"""dots.llm of rednote-hilab."""

from dataclasses import replace

from expertsmith.arch.kinds import DEEPSEEK

FAMILIES = (
    replace(
        DEEPSEEK,
        model_type="dots1",
        title="dots.llm1 (rednote-hilab/dots.llm1.base)",
    ),
    replace(
        DEEPSEEK,
        model_type="dots3_note_text",
        title="dots.note 3 (rednote-hilab/dots3.note)",
        width_sizes="nothing",
        notes="Vision and audio tensors (including the vision tower's experts) and processor files are copied unchanged.",
    ),
)
