"""Train the small English model that ships with vattn, from nothing but Debian packages.

    python examples/train_tiny.py corpus      # fetch documentation, keep its prose: a minute
    python examples/train_tiny.py train       # tokenizer and model: 28 minutes on one busy core
    python examples/train_tiny.py evaluate    # bits per byte on held-out text, real words

`corpus` needs Debian 12 with package lists (`apt-get update`); it installs nothing and needs no
root. `evaluate` loads the files as shipped, so it measures what a user gets.
"""

import json
import math
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".cache" / "train_tiny"
MODEL = ROOT / "vattn" / "models" / "tiny"
Work = Annotated[Path, typer.Option(help="Where packages and text are kept.")]
Model = Annotated[Path, typer.Option(help="The model's directory.")]

# Debian packages; the model card states their licences.
SOURCES = ["ant-doc", "apache2-doc", "erlang-doc", "libx11-doc", "llvm-15-doc", "postgresql-doc-15"]
SOURCES += ["python-django-doc", "python-scrapy-doc", "python-sqlalchemy-doc", "python3.11-doc"]
SOURCES += ["rust-doc", "sqlite3-doc"]
# Pages to leave out: other languages, change logs, legal texts, copies, generated reference, and
# those of Rust's books that have other licences.
UNWANTED = re.compile(
    r"print\.html|/news|notes|change|licen[cs]e|copyright|AMDGPU|/wx-|ant/api|/std/(arch|simd)"
    r"|apache2-doc/manual/(?!en/)|rust-doc/html/(?!(book|nomicon|reference|rustc|std)/)"
)
WORD_LIST = "wamerican"
HELD_OUT_ONE_IN = 40

VOCAB, CONTEXT = 2048, 2048  # the context is what positions allow; training sees 512
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS_PER_STEP = 4096

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)

SKIPPED = re.compile("pre|table|nav|footer|header|script|style|dt|aside|h[1-3]")
BLOCKS = re.compile(f"{SKIPPED.pattern}|p|div|ul|ol|li|dl|dd|section|body")


class Paragraphs(HTMLParser):
    """Collects the text of a page's `<p>` elements, outside code, tables, headings, navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open = False  # inside a paragraph
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if SKIPPED.fullmatch(tag):
            self._skipping.append(tag)
        if tag == "p":
            self.found.append("")
        if BLOCKS.fullmatch(tag):
            self._open = tag == "p"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            del self._skipping[self._skipping.index(tag) :]
        elif BLOCKS.fullmatch(tag):
            self._open = False

    def handle_data(self, data: str) -> None:
        if self._open and not self._skipping:
            self.found[-1] += data


PLAIN = re.compile(r"[A-Z\"][A-Za-z0-9 ,.;:'\"()?!-]{78,}[.!?]")
CODE = re.compile(r"\(\)|\w[.:](?!g\.|e\.)\w|--|\.\.|''|:[A-Za-z]|\b[A-Za-z]*\d[A-Za-z]| [-.:;,]")
TYPESET = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "¶": ""})


def is_prose(text: str) -> bool:
    """True for a whole paragraph of sentences with no code, markup or figures in it."""
    return bool(
        PLAIN.fullmatch(text)
        and not CODE.search(text)
        and sum(map(str.isupper, text)) <= 0.07 * len(text)
        and sum(map(str.isdigit, text)) <= 0.01 * len(text)
        and text.count("(") == text.count(")")
        and text.count('"') % 2 == 0
    )


def pages(package: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, paragraphs of prose) for each page of an unpacked package, sorted by name."""
    for path in sorted((package / "usr/share/doc").rglob("*.html")):
        name = f"{package.name}/{path.relative_to(package / 'usr/share/doc')}"
        if path.is_file() and not UNWANTED.search(name):
            page = Paragraphs()
            page.feed(path.read_text("utf-8", "replace"))
            text = (" ".join(p.translate(TYPESET).split()) for p in page.found)
            yield name, [p for p in text if is_prose(p)]


@app.command()
def corpus(work: Work = WORK) -> None:
    """Download the packages and write train.jsonl and heldout.jsonl."""
    debs, unpacked = work / "debs", work / "unpacked"
    debs.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(exist_ok=True)
    if missing := [p for p in (*SOURCES, WORD_LIST) if not list(debs.glob(f"{p}_*.deb"))]:
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True)
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", deb, unpacked / deb.name.split("_")[0]], check=True)

    seen: set[str] = set()  # a paragraph counts once, so none is both trained on and held out
    with (work / "train.jsonl").open("w") as train, (work / "heldout.jsonl").open("w") as held:
        for source in SOURCES:
            sizes = []
            for name, found in pages(unpacked / source):
                fresh = [p for p in dict.fromkeys(found) if p not in seen]
                seen.update(fresh)
                if len(fresh) >= 2:
                    text = "\n\n".join(fresh)
                    hashed = int(sha256(name.encode()).hexdigest(), 16)
                    split = held if hashed % HELD_OUT_ONE_IN == 0 else train
                    print(json.dumps({"name": name, "text": text}), file=split)
                    sizes.append(len(text))
            (deb,) = debs.glob(f"{source}_*.deb")
            print(f"{deb.stem:50} {len(sizes):5} documents {sum(sizes) / 1e6:6.2f} MB of prose")


def documents(path: Path) -> list[str]:
    """The texts of one split, in order."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE; it writes `<s>` before each text and pads on the left."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast: Any = transformers.PreTrainedTokenizerFast
    how = {"padding_side": "left", "clean_up_tokenization_spaces": False, **SPECIAL}
    return fast(tokenizer_object=bpe, model_max_length=CONTEXT, **how)


def new_model() -> Any:
    """A Llama of 1.97 million parameters, just under 4 MB in two-byte floats."""
    size: Any = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    heads: Any = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    limits: Any = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, **SPECIAL_IDS}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **heads, **limits))


def token_stream(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """All texts as one `[N]` int64 tensor: `<s>` text `</s>` `<s>` text `</s>` ..."""
    encoded = tokenizer([f"{text}</s>" for text in texts], verbose=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in ids])


def learning_rate(done: float, peak: float = 3e-3) -> float:
    """Linear warm-up over the first 3% of the run, then a cosine down to 2% of the peak."""
    return peak * min(done / 0.03, 0.51 + 0.49 * math.cos(math.pi * done))


def save(model: Any, tokenizer: Any, path: Path) -> None:
    """Matrices are stored as float8, which costs 0.1% of bits per byte, and computed as float32."""
    tokenizer.save_pretrained(path)
    written = path / "tokenizer.json"  # a third of the size without its indentation
    compact = json.dumps(json.loads(written.read_text()), ensure_ascii=False, separators=(",", ":"))
    written.write_text(compact + "\n")
    generation: Any = transformers.GenerationConfig
    model.generation_config = generation(**SPECIAL_IDS)
    model.half().save_pretrained(path)
    stored = load_file(path / "model.safetensors")
    matrices = {name: w.to(torch.float8_e4m3fn) for name, w in stored.items() if w.ndim == 2}
    save_file(stored | matrices, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@app.command()
def train(
    work: Work = WORK,
    model_dir: Model = MODEL,
    steps: Annotated[int, typer.Option(help="Optimizer steps of 4096 tokens.")] = 1800,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Train on train.jsonl; write tokenizer, model and words.txt to the model's directory."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    texts = documents(work / "train.jsonl")
    tokenizer = train_tokenizer(texts)
    stream = token_stream(tokenizer, texts)
    held_out = documents(work / "heldout.jsonl")
    print(f"{sum(map(len, texts)) / 1e6:.2f} MB in {len(texts)} documents, {len(stream)} tokens")

    model = new_model()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    # Muon was at step 150 where AdamW alone was at step 200; it is made for matrices only.
    muon: Any = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw: Any = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    started = time.time()
    for step in range(steps):
        # Short contexts are a quarter faster per token; the last third stretches to 512.
        context = 256 if step < steps * 2 // 3 else 512
        starts = torch.randint(len(stream) - context - 1, (TOKENS_PER_STEP // context, 1))
        batch = stream[starts + torch.arange(context + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss: Any = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((step + 1) / steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 200 == 199:
            seconds, held = time.time() - started, bits_per_byte(model, tokenizer, held_out[:12])
            print(f"{step + 1:5} steps {seconds:5.0f} s  held out {held:.3f} bits/byte", flush=True)

    save(model, tokenizer, model_dir)
    listed = "\n".join(own_words(texts))[:60_000]
    (model_dir / "words.txt").write_text(listed[: listed.rindex("\n") + 1])


def words(text: str) -> list[str]:
    """The words of a text in lower case; a possessive counts as its owner."""
    return [w.lower().removesuffix("'s") for w in re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text)]


def own_words(texts: list[str], at_least: int = 5) -> list[str]:
    """The words that occur `at_least` times in the texts, most frequent first."""
    counts = Counter(w for text in texts for w in words(text))
    return [w for w, n in counts.most_common() if n >= at_least]


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Bits per UTF-8 byte, in windows of 512 tokens; each text starts anew and pays for `</s>`."""
    nats = 0.0
    for text in texts:
        stream = token_stream(tokenizer, [text])
        for at in range(0, len(stream) - 1, 512):
            window = stream[at : at + 513]
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            nats += cross_entropy(logits.float(), window[1:], reduction="sum").item()
    return nats / sum(len(t.encode()) for t in texts) / math.log(2)


@app.command()
def evaluate(work: Work = WORK, model_dir: Model = MODEL, seed: int = 0) -> None:
    """Print held-out bits per byte and the share of real words among 500 sampled ones."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_dir)
    held_out = documents(work / "heldout.jsonl")
    print(f"held out: {len(held_out)} documents, {sum(len(t.encode()) for t in held_out)} bytes")
    print(f"bits per byte: {bits_per_byte(model, tokenizer, held_out):.3f}")

    torch.manual_seed(seed)
    start = tokenizer([""] * 8, return_tensors="pt")  # `<s>` alone
    how: Any = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 0,
        "max_new_tokens": 160,
    }
    out = model.generate(**start, **how)
    samples = tokenizer.batch_decode(out, skip_special_tokens=True)
    # The last word of a sample may be cut off by the length limit, so it does not count.
    sampled = [w for text in samples for w in words(text)[:-1]][:500]
    english = work / "unpacked" / WORD_LIST / "usr/share/dict/american-english"
    known = {w.lower() for w in english.read_text().split()}
    known |= set(own_words(documents(work / "train.jsonl")))
    unreal = [w for w in sampled if w not in known]
    print(f"real words: {1 - len(unreal) / len(sampled):.1%} of {len(sampled)}; not real: {unreal}")
    print("\n---\n".join(samples[:3]))


if __name__ == "__main__":
    app()
