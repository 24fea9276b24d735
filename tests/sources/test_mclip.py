"""Multilingual text towers as ours, against transformers' encoders with a mean and a layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tiny import tiny_clip
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from compress import clip as clips
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.sources import folder, mclip

transformers = pytest.importorskip("transformers")

GOLDEN = ["", "a photo of a cat", "word " * 100, "crème brûlée", "一只猫坐在垫子上", "👩‍🚀 🚀"]
EMBED, WIDTH = 16, 32
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "vocab_size": 200,
}
DISTIL = {"dim": WIDTH, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 200}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the CLIP whose image tower is used; its embeddings have 16 numbers."""
    path = tmp_path_factory.mktemp("image") / "clip"
    clips.save(tiny_clip(embed_dim=EMBED), path)
    return path


def tokenizer(path: Path) -> None:
    """Sentence pieces with XLM-R's marks; <pad> is 1."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    file = tokenizers.Tokenizer(models.Unigram())
    file.normalizer = normalizers.NFKC()
    file.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=190, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    file.train_from_iterator(GOLDEN, trainer)
    file.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    file.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def random_(model: nn.Module) -> Any:
    """The module in evaluation mode; norms and biases are random too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=0.3)
    return model.eval()


def m_clip(path: Path) -> tuple[Any, nn.Linear]:
    """M-CLIP's own layout, as its class saves it."""
    path.mkdir(parents=True)
    encoder = random_(transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SHAPE)))
    linear = random_(nn.Linear(WIDTH, EMBED))
    state = {f"transformer.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"LinearTransformation.{name}": t for name, t in linear.state_dict().items()}
    torch.save(state, path / "pytorch_model.bin")
    config = {"model_type": "M-CLIP", "modelBase": "xlm-roberta-large", "numDims": EMBED, **SHAPE}
    shape = {"layer_norm_eps": encoder.config.layer_norm_eps, "license": "mit"}
    (path / "config.json").write_text(json.dumps(config | shape))
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    tokenizer(path)
    return encoder, linear


def sentence_transformer(path: Path, pooling: str = "mean_tokens") -> tuple[Any, nn.Linear]:
    """A folder of sentence-transformers: DistilBERT, a pooling, a dense layer without a bias."""
    config = transformers.DistilBertConfig(**DISTIL, pad_token_id=1)
    encoder = random_(transformers.DistilBertModel(config))
    linear = random_(nn.Linear(WIDTH, EMBED, bias=False))
    encoder.save_pretrained(path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": n, "name": str(n), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for n, (place, kind) in enumerate(kinds.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    dense = {"in_features": WIDTH, "activation_function": "torch.nn.modules.linear.Identity"}
    for place, content in (("1_Pooling", {f"pooling_mode_{pooling}": True}), ("2_Dense", dense)):
        (path / place).mkdir()
        (path / place / "config.json").write_text(json.dumps(content))
    save_file({"linear.weight": linear.weight.data}, path / "2_Dense/model.safetensors")
    tokenizer(path)
    return encoder, linear


@torch.no_grad()
def embedded(encoder: Any, linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Mean over the tokens that aren't padding, then the layer: both libraries' definition."""
    mask = (tokens != 1).long()
    states = encoder(input_ids=tokens.long(), attention_mask=mask)[0]
    return linear((states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True))


def same(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max()
    assert expected.std() > 1e-3
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=3e-6)


@torch.no_grad()
@pytest.mark.parametrize(("write", "length"), [(m_clip, 38), (sentence_transformer, 24)])
def test_texts_embed_as_upstream_and_pictures_as_before(
    write: Any, length: int, image: Path, tmp_path: Path
) -> None:
    encoder, linear = write(tmp_path / "texts")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}")
    beside: Clip = folder.load(image)
    tokens = ours.tokenizer(GOLDEN)
    assert tokens.shape[1] == length
    same(ours.model.encode_text(tokens), embedded(encoder, linear, tokens))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.model.encode_image(pixels), beside.model.encode_image(pixels))
    assert ours.preprocess == beside.preprocess
    assert [step.get("step") for step in ours.provenance][-1] == "mclip"


def test_ids_equal_the_tokenizer_of_the_folder(image: Path, tmp_path: Path) -> None:
    m_clip(tmp_path / "texts")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}").tokenizer
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "texts")
    texts = [" ".join(text.split()) for text in GOLDEN]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=38).input_ids
    assert ours(GOLDEN).tolist() == expected


def test_a_saved_folder_opens_again(image: Path, tmp_path: Path) -> None:
    sentence_transformer(tmp_path / "texts")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}")
    clips.save(ours, tmp_path / "ours")
    tokens = ours.tokenizer(GOLDEN)
    again = clips.load(tmp_path / "ours")
    torch.testing.assert_close(again.model.encode_text(tokens), ours.model.encode_text(tokens))


def test_licences_of_both_sides_travel(image: Path, tmp_path: Path) -> None:
    m_clip(tmp_path / "texts")
    (tmp_path / "texts/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}")
    assert ours.license == "texts: cc-by-nc-4.0; images: Apache-2.0"
    assert ours.provenance[-1]["research_only"]


def test_what_does_not_fit_is_named(image: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    m_clip(texts)
    with pytest.raises(PocketclipError, match="a text tower alone; name the image model"):
        mclip.load(str(texts))
    with pytest.raises(PocketclipError, match=r"texts only; .* mclip:.*texts\+open_clip"):
        folder.load(texts)
    clips.save(tiny_clip(embed_dim=24), tmp_path / "wide")
    with pytest.raises(PocketclipError, match=r"texts become 16 numbers, .* pictures 24"):
        mclip.load(f"{texts}+{tmp_path / 'wide'}")
    config = json.loads((texts / "config.json").read_text())
    (texts / "config.json").write_text(json.dumps({**config, "modelBase": "gpt2"}))
    with pytest.raises(PocketclipError, match=r"'gpt2' \(modelBase\) is not supported"):
        mclip.load(f"{texts}+{image}")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("2_Dense/config.json", {"activation_function": "torch.nn.Tanh"}, "ends in torch.nn.Tanh"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "not supported: pooling_mode"),
        ("modules.json", [{"type": "x.Transformer", "path": ""}], "a text tower beside a CLIP has"),
        ("modules.json", {"a": 1}, "not a list of modules"),
    ],
)
def test_other_layers_are_refused(
    file: str, content: Any, words: str, image: Path, tmp_path: Path
) -> None:
    sentence_transformer(tmp_path / "texts")
    (tmp_path / "texts" / file).write_text(json.dumps(content))
    with pytest.raises(PocketclipError, match=words):
        mclip.load(f"{tmp_path / 'texts'}+{image}")
