"""Whether the parts of a model, read from different places, belong together."""

from compress.clip import Clip
from compress.errors import PocketclipError


def fitting(clip: Clip) -> Clip:
    """The same clip; PocketclipError if its towers cannot take what its contracts produce."""
    vision, text = clip.model.config.vision, clip.model.config.text
    contract, size = clip.tokenizer.contract, clip.preprocess.size
    ids = clip.tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()
    highest = max(*ids, contract.start_id or 0, contract.end_id, contract.pad_id)
    problems = []
    if size != (vision.image_size, vision.image_size):
        problems.append(f"preprocess makes {size}, the image tower takes {vision.image_size}")
    if contract.context_length != text.context_length:
        problems.append(
            f"the tokenizer makes {contract.context_length} ids, "
            f"the text tower takes {text.context_length}"
        )
    if highest >= text.vocab_size:
        problems.append(
            f"the tokenizer's highest id is {highest}, the text tower has {text.vocab_size} rows"
        )
    if problems:
        raise PocketclipError(f"{clip.name}: {'; '.join(problems)}")
    return clip
