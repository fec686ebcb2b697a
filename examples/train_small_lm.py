"""Train a small language model from text anyone can fetch again: the yardstick of every quality figure in lowp.

Why our own model. A quality figure ("int4/1x128 costs 2 % perplexity") is a statement about a model and a text. To be checked by
anyone, offline, in seconds, it wants a model small enough to lie in the repository, really trained (random weights have no
outliers, no low-rank structure and nothing to lose), and a held-out text that the model has never seen. So this one script makes
all of it:

    corpus      Debian documentation packages with permissive licences -> plain text -> deduplicated -> split by document
                -> byte-level BPE tokenizer (6144 tokens) -> token ids
    train       LlamaForCausalLM from random weights: fp32 master weights, bf16 autocast, AdamW, warmup and cosine
    card        perplexity on the held-out text, samples, and the README.md of the model

    python examples/train_small_lm.py corpus --work build/lm                             (needs apt-get, dpkg, lxml; 10 minutes)
    python examples/train_small_lm.py train  --work build/lm --size 8m --out build/lm/8m (minutes on one GPU)
    python examples/train_small_lm.py card   --work build/lm --model build/lm/8m --text build/lm/heldout.txt

What is minimised is the mean negative log-likelihood of the next token, and two figures are derived from it:

    loss = -1/N * sum_i log p(token_i | token_<i)         perplexity = exp(loss)
    bits per byte = loss * N / (ln 2 * bytes of the text) -- comparable between tokenizers, perplexity is not

All linear dimensions are multiples of 128, so every block size of lowp divides them.

Sources: Touvron et al., "LLaMA" (2302.13971), the architecture; Hoffmann et al., "Training compute-optimal large language models"
(2203.15556), sizes and schedule; Lee et al., "Deduplicating training data makes language models better" (2107.06499);
Muennighoff et al., "Scaling data-constrained language models" (2305.16264), on how much repeated epochs are still worth.

Shapes: B sequences in a batch, T tokens in a sequence, V vocabulary, D hidden.
"""

import argparse
import copy
import csv
import gzip
import hashlib
import json
import lzma
import math
import re
import subprocess
import time
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

END = "<|endoftext|>"
PAD = "<|pad|>"
VOCAB = 6144  # 48 * 128; two bytes hold an id, and the tied embedding stays a fifth of the 8m model


# ---- sources -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source:
    package: str
    licence: str  # of the documentation, as read in the package's copyright file
    keep: str = r"\.html$"  # which files are pages
    reader: str = "html"


SOURCES = [
    Source(package="sqlite3-doc", licence="public domain"),
    Source(package="python3.11-doc", licence="PSF-2.0"),
    Source(package="postgresql-doc-15", licence="PostgreSQL"),
    Source(
        package="rust-doc",
        licence="MIT or Apache-2.0",
        keep=r"/html/(book|reference|nomicon|rust-by-example|cargo|rustc|edition-guide|embedded-book|std)/.*\.html$",
    ),
    Source(package="bible-kjv-text", licence="public domain", reader="bible"),
    Source(package="jargon-text", licence="public domain", keep=r"jargon\.txt\.gz$", reader="jargon"),
    Source(package="apache2-doc", licence="Apache-2.0", keep=r"/manual/en/.*\.html$"),
    Source(package="llvm-14-doc", licence="Apache-2.0 with LLVM exception"),
    Source(package="clang-14-doc", licence="Apache-2.0 with LLVM exception"),
    Source(package="libboost1.81-doc", licence="BSL-1.0"),
    Source(package="cmake-doc", licence="BSD-3-Clause"),
    Source(package="nodejs-doc", licence="MIT"),
    Source(package="erlang-doc", licence="Apache-2.0"),
    Source(package="ant-doc", licence="Apache-2.0"),
    Source(package="twisted-doc", licence="MIT"),
    Source(package="sphinx-doc", licence="BSD-2-Clause"),
    Source(package="numba-doc", licence="BSD-2-Clause"),
    Source(package="cinder-doc", licence="Apache-2.0"),
    Source(package="ironic-doc", licence="Apache-2.0"),
    Source(package="keystone-doc", licence="Apache-2.0"),
    Source(package="neutron-doc", licence="Apache-2.0"),
    Source(package="nova-doc", licence="Apache-2.0"),
    Source(package="swift-doc", licence="Apache-2.0"),
    Source(package="python-astropy-doc", licence="BSD-3-Clause"),
    Source(package="python-cryptography-doc", licence="Apache-2.0 or BSD-3-Clause"),
    Source(package="python-dask-doc", licence="BSD-3-Clause"),
    Source(package="python-django-doc", licence="BSD-3-Clause"),
    Source(package="python-flask-doc", licence="BSD-3-Clause"),
    Source(package="python-pandas-doc", licence="BSD-3-Clause"),
    Source(package="python-pytest-doc", licence="MIT"),
    Source(package="python-scipy-doc", licence="BSD-3-Clause"),
    Source(package="python-scrapy-doc", licence="BSD-3-Clause"),
    Source(package="python-sklearn-doc", licence="BSD-3-Clause"),
    Source(package="python-statsmodels-doc", licence="BSD-3-Clause"),
    Source(package="python-sympy-doc", licence="BSD-3-Clause"),
    Source(package="python-tornado-doc", licence="Apache-2.0"),
    Source(package="python-werkzeug-doc", licence="BSD-3-Clause"),
    Source(package="python-xarray-doc", licence="Apache-2.0"),
]

# Pages that are lists, source listings, histories or copies of other pages.
SKIP = re.compile(
    r"genindex|py-modindex|modindex|/search|/index-all|allclasses|constant-values|overview-tree|package-tree|/class-use/"
    r"|/_modules/|/_sources/|/_static/|/src/|all\.html$|print\.html$|bookindex|theindex|docindex|/index-\d|moduleIndex|classIndex"
    r"|nameIndex|undoccedSummary|changelog|changes|whatsnew|what_s_new|history|release|/news|notes\.html$|license|copyright"
    r"|/core_arch/|/core_simd/|/simd/|/arch/|/all_|keyword\.|sitemap|quickreference|/toc\.html|_toc\.html",
    re.IGNORECASE,
)


def fetch(source: Source, work: Path) -> Path:
    """Download a package and unpack it under work/packages/<name>; nothing is installed."""
    root = work / "packages" / source.package
    if root.is_dir():
        return root
    downloads = work / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    root.parent.mkdir(parents=True, exist_ok=True)  # dpkg makes the last folder alone
    # The King James text is stored in a format of its own, read by the program of the package bible-kjv.
    for package in [source.package] + (["bible-kjv"] if source.reader == "bible" else []):
        subprocess.run(["apt-get", "download", "-q", package], cwd=downloads, check=True, capture_output=True)
        subprocess.run(["dpkg", "-x", str(next(downloads.glob(f"{package}_*.deb"))), str(root)], check=True)
    return root


# ---- pages to plain text -------------------------------------------------------------------------------------------

MAIN = (
    '//main | //article[@role="main"] | //div[@role="main"] | //div[@id="apicontent"] | //div[@id="page-content"]'
    ' | //div[@id="main"] | //div[@id="content"]'
)
DROP_TAGS = {
    "script",
    "style",
    "nav",
    "header",
    "footer",
    "aside",
    "noscript",
    "button",
    "form",
    "svg",
    "img",
    "head",
    "select",
    "template",
    "iframe",
}
DROP_CLASS = re.compile(
    r"headerlink|viewcode|sphinxsidebar|related|navheader|navfooter|breadcrumb|toctree|sidebar|footer|anchor"
    r"|srclink|src-|since|line-numbers|linenos|copybtn|langselect|toplang|bottomlang|toc\b|prev-next|navbar"
    r"|contents|sourcelink|mark\b|implementors|spirit-nav|searchbox|metadata|deprecated_links"
)
BLOCKS = {
    "p",
    "div",
    "section",
    "article",
    "main",
    "ul",
    "ol",
    "dl",
    "dd",
    "dt",
    "table",
    "tr",
    "blockquote",
    "figure",
    "body",
    "details",
    "summary",
    "center",
    "tbody",
    "thead",
    "caption",
    "fieldset",
    "hr",
    "address",
    "pre",
    "li",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
}


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def render(node, out: list[str], inline: list[str]) -> None:
    """Walk an element in document order: inline text gathers in `inline`, each block boundary makes it a paragraph of `out`."""

    def flush(prefix: str = "") -> None:
        text = flat("".join(inline))
        inline.clear()
        if text:
            out.append(prefix + text)

    tag = node.tag if isinstance(node.tag, str) else None
    if tag is None or tag in DROP_TAGS or (node.get("class") and DROP_CLASS.search(node.get("class").lower())):
        return
    if tag == "pre":
        flush()
        code = "\n".join(line.rstrip() for line in node.text_content().expandtabs(4).strip("\n").split("\n"))
        if code.strip():
            out.append("    " + code.replace("\n", "\n    "))
        return
    if tag == "br":
        inline.append("\n")
        return
    if tag not in BLOCKS:
        inline.append(node.text or "")
        for child in node:
            render(child, out, inline)
            inline.append(child.tail or "")
        return
    flush()
    if tag == "tr":
        cells = [flat(cell.text_content()) for cell in node if cell.tag in ("td", "th")]
        if any(cells):
            out.append(" | ".join(cells))
        return
    inline.append(node.text or "")
    for child in node:
        render(child, out, inline)
        inline.append(child.tail or "")
    flush("#" * int(tag[1]) + " " if re.fullmatch("h[1-6]", tag) else "- " if tag == "li" else "")


def read_html(path: Path) -> list[list[str]]:
    import lxml.html  # here, because a machine that only trains does not need it

    try:
        page = lxml.html.fromstring(path.read_bytes(), parser=lxml.html.HTMLParser(encoding="utf-8"))
    except (lxml.etree.LxmlError, ValueError):
        return []
    mains = page.xpath(MAIN)
    paragraphs: list[str] = []
    render(mains[0] if mains else page, paragraphs, [])
    return [paragraphs]


def read_bible(path: Path) -> list[list[str]]:
    """One document for each chapter, one paragraph for each verse."""
    root = path.parents[2]
    command = [str(root / "usr/bin/bible"), "-p", f"{path.parent}/", "-l100000", "gen1:1-rev22:21"]
    text = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode("latin-1")
    documents: list[list[str]] = []
    for line in filter(None, map(flat, text.split("\n"))):
        if not line[0].isdigit() or re.match(r"\d (Samuel|Kings|Chron|Cor|Thess|Tim|Pet|John)[a-z]* \d+$", line):
            documents.append(["# " + line])
        elif documents:
            documents[-1].append(line)
    return documents


def read_jargon(path: Path) -> list[list[str]]:
    """Documents of about 30 paragraphs, so that the split can take some of them."""
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    paragraphs = [p for p in map(flat, re.split(r"\n\s*\n", text)) if len(p) > 60]
    return [paragraphs[i : i + 30] for i in range(0, len(paragraphs), 30)]


READERS = {"html": read_html, "bible": read_bible, "jargon": read_jargon}


def is_prose(paragraph: str) -> bool:
    """False for tables of numbers, encoded data and text in other scripts."""
    if len(paragraph) > 200 and sum(c.isalpha() or c.isspace() for c in paragraph) < 0.6 * len(paragraph):
        return False
    return max(map(len, paragraph.split()), default=0) <= 100 and sum(ord(c) > 127 for c in paragraph) <= 0.1 * len(
        paragraph
    )


def key(text: str) -> bytes:
    return hashlib.blake2b(re.sub(r"\W+", " ", text).lower().encode(), digest_size=8).digest()


@dataclass(frozen=True, kw_only=True)
class Document:
    package: str
    name: str  # path in the package, and a number where a file holds several documents
    text: str

    @property
    def digest(self) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.package}/{self.name}".encode()).digest()[:8], "big")


def deduplicate(documents: list[Document], seen: Counter) -> list[Document]:
    """Keep a paragraph of at least 80 characters the first time, a shorter one 20 times; drop what then is hardly a document."""
    kept = []
    for document in documents:
        paragraphs = document.text.split("\n\n")
        left = []
        for paragraph in paragraphs:
            digest = key(paragraph)
            seen[digest] += 1
            if seen[digest] <= (1 if len(paragraph) >= 80 else 20):
                left.append(paragraph)
        text = "\n\n".join(left)
        if len(text) >= 400 and len(text) >= 0.3 * len(document.text):
            kept.append(replace(document, text=text))
    return kept


def read_source(source: Source, work: Path, cap: int) -> list[Document]:
    """The documents of one package, in the order of their digests, until they hold `cap` characters."""
    if source.reader == "bible":
        files = [work / "packages" / source.package / "usr/lib/bible.data"]
    else:
        root = work / "packages" / source.package
        files = [
            p
            for p in sorted(root.rglob("*"))
            if p.is_file()
            and not p.is_symlink()
            and re.search(source.keep, f"/{p.relative_to(root)}")
            and not SKIP.search(f"/{p.relative_to(root)}")
        ]
        files.sort(key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())
    documents, seen, total = [], Counter(), 0
    for path in files:
        name = str(path.relative_to(work / "packages" / source.package))
        for i, paragraphs in enumerate(READERS[source.reader](path)):
            paragraphs = [unicodedata.normalize("NFC", p).replace("\u00b6", "").rstrip() for p in paragraphs]
            text = "\n\n".join(p for p in paragraphs if p and is_prose(p)).replace(END, "").replace("\0", "")
            new = deduplicate([Document(package=source.package, name=f"{name}#{i}", text=text)], seen)
            documents += new
            total += sum(len(d.text) for d in new)
        if total >= cap:
            break
    return documents


# ---- tokens --------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[Document], out: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"  # the class name that both transformers 4 and 5 know
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
    )
    return bpe


def encode(bpe, documents: list[Document]) -> np.ndarray:
    """All documents one after the other, each closed by END."""
    pieces, documents = [], iter(documents)
    while batch := list(islice(documents, 512)):
        pieces += [np.array(e.ids, dtype=np.uint16) for e in bpe.encode_batch([d.text + "\n" + END for d in batch])]
    return np.concatenate(pieces)


def save_tokens(path: Path, tokens: np.ndarray) -> None:
    # lp=1: positions alternate between the low and the high byte of an id
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 4, "lc": 3, "lp": 1, "pb": 1}]
    path.write_bytes(lzma.compress(tokens.astype("<u2").tobytes(), format=lzma.FORMAT_XZ, filters=filters))


def overlap(tokens: np.ndarray, heldout: np.ndarray, window: int = 64) -> float:
    """The share of held-out windows that also occur, token by token, in the training text: the leak deduplication left."""

    def hashes(ids: np.ndarray) -> np.ndarray:
        total = np.zeros(len(ids) - window + 1, np.uint64)
        for i in range(window):  # a polynomial modulo 2**64; the factor is the one of Knuth's MMIX generator
            total = total * np.uint64(6364136223846793005) + ids[i : i + len(total)].astype(np.uint64) + np.uint64(1)
        return total

    return float(np.isin(hashes(heldout), hashes(tokens)).mean())


def load_tokens(path: Path) -> np.ndarray:
    if not path.is_file():
        raise SystemExit(
            f"wanted the token file {path}, found none; make it with: train_small_lm.py corpus --work {path.parent}"
        )
    return np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")


def sample_heldout(documents: list[Document], size: int) -> list[Document]:
    """A mix by document: one of each package in turn, those of 1 to 24 kB, until `size` characters are taken."""
    queues: dict[str, list[Document]] = {}
    for document in sorted(documents, key=lambda d: d.digest):
        if 1000 <= len(document.text) <= 24000:
            queues.setdefault(document.package, []).append(document)
    taken: list[Document] = []
    while any(queues.values()):
        for package in sorted(queues):
            if queues[package]:
                taken.append(queues[package].pop(0))
                if sum(len(d.text) for d in taken) >= size:
                    return taken
    return taken


def corpus(args) -> None:
    work = args.work
    for source in SOURCES:
        fetch(source, work)
    with ProcessPoolExecutor(args.processes) as pool:
        per_source = list(pool.map(partial(read_source, work=work, cap=args.cap_mb * 10**6), SOURCES))
    documents = deduplicate([d for ds in per_source for d in ds], Counter())
    documents.sort(key=lambda d: d.digest)
    heldout = [d for d in documents if d.digest % 1000 < 10 * args.heldout_percent]
    train_docs = [d for d in documents if d.digest % 1000 >= 10 * args.heldout_percent]
    sizes = Counter()
    for d in documents:
        sizes[d.package] += len(d.text.encode())
    print(f"{len(train_docs)} documents to train on, {len(heldout)} held out, {sum(sizes.values()) / 1e6:.1f} MB")
    for package, size in sizes.most_common():
        print(f"    {size / 1e6:6.2f} MB  {package}")

    bpe = train_tokenizer(train_docs[::3], work / "tokenizer")
    ids, heldout_ids = encode(bpe, train_docs), encode(bpe, heldout)
    save_tokens(work / "train.u16.xz", ids)
    save_tokens(work / "heldout.u16.xz", heldout_ids)
    text = "".join(d.text + "\n" + END for d in sample_heldout(heldout, 360_000))
    (work / "heldout.txt").write_text(text, encoding="utf-8")
    facts = dict(
        documents=len(train_docs),
        heldout_documents=len(heldout),
        tokens=len(ids),
        heldout_tokens=len(heldout_ids),
        heldout_overlap=round(overlap(ids, heldout_ids), 4),
        bytes=sum(len(d.text.encode()) + 1 for d in train_docs),
        heldout_bytes=sum(len(d.text.encode()) + 1 for d in heldout),
        sources=[
            dict(package=s.package, version=version(s, work), licence=s.licence, bytes=sizes[s.package])
            for s in SOURCES
        ],
    )
    (work / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    print({k: v for k, v in facts.items() if k != "sources"})


def version(source: Source, work: Path) -> str:
    return next((work / "downloads").glob(f"{source.package}_*.deb")).name.split("_")[1].replace("%3a", ":")


# ---- model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    lr: float
    dtype: str = "bfloat16"


SIZES = {
    "8m": Size(hidden=256, intermediate=768, layers=8, heads=4, kv_heads=2, lr=3e-3),
    "30m": Size(hidden=512, intermediate=1536, layers=8, heads=8, kv_heads=4, lr=1.5e-3),
}


def build(size: Size, context: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=64,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            attention_dropout=0.0,
            attn_implementation="sdpa",
        )
    )


def logits_of(model, inputs_BT):
    """(B, T, V). The layers are called one by one, without a mask: then attention is plainly causal and takes the flash kernel,
    while the model's own forward builds a B x T x T mask when it is compiled."""
    import torch

    llama = model.model
    x_BTD = llama.embed_tokens(inputs_BT)
    rotary = llama.rotary_emb(x_BTD, position_ids=torch.arange(inputs_BT.shape[1], device=inputs_BT.device)[None])
    for layer in llama.layers:
        x_BTD = layer(x_BTD, attention_mask=None, position_embeddings=rotary)
    return model.lm_head(llama.norm(x_BTD))


def next_token_loss(model, tokens_BT):
    """Mean loss over packed sequences."""
    import torch.nn.functional as F

    logits_BTV = logits_of(model, tokens_BT[:, :-1]).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def save_model(model, out: Path, tokenizer: Path, max_shard: str) -> None:
    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out, max_shard_size=max_shard)
    for path in tokenizer.iterdir():
        (out / path.name).write_bytes(path.read_bytes())


# ---- training ------------------------------------------------------------------------------------------------------


def batches(tokens, batch: int, context: int, generator):
    """Endless epochs: cut the stream at a random offset into pieces of T + 1 tokens, shuffle, group."""
    import torch

    span = torch.arange(context + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        count = (len(tokens) - offset - 1) // context
        order = torch.randperm(count, generator=generator).to(tokens.device)
        for i in range(0, count - batch + 1, batch):
            starts_B1 = offset + order[i : i + batch, None] * context
            yield tokens[starts_B1 + span].long()


def learning_rate(peak: float, done: float, warmup: float = 0.02) -> float:
    """Warmup over the first 2 %, then cosine to zero; `done` is the fraction of the run behind us."""
    if done < warmup:
        return peak * max(done, 1e-3) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


def train(args) -> None:
    import torch

    started = time.monotonic()
    size = SIZES[args.size]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    context, batch = args.context, args.batch
    ids = load_tokens(args.work / "train.u16.xz")
    if len(ids) < 2 * batch * context:
        raise SystemExit(
            f"wanted at least {2 * batch * context} tokens for --batch {batch} --context {context}, got {len(ids)}; "
            "take a smaller batch"
        )
    # An id is below 6144, so int16 holds it; int16 indexes and converts on every device, uint16 does not.
    tokens = torch.from_numpy(ids.astype(np.int16)).to(device)
    heldout = torch.from_numpy(load_tokens(args.work / "heldout.u16.xz").astype(np.int16)).to(device)

    model = build(size, context).to(device)
    if args.recipe:
        from lowp.train import convert

        print(convert(model, args.recipe, keep_small=False), flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)],
        lr=size.lr,
        betas=(0.9, 0.95),
        fused=cuda,
    )
    loss_of = partial(next_token_loss, model)
    compiled = torch.compile(loss_of, dynamic=False) if args.compile and cuda else loss_of

    def forward(tokens_BT):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return compiled(tokens_BT)

    def heldout_loss() -> float:
        # With gradients on, unused: the compiled graph stays the one of the training step, and no second one is compiled.
        count = min((len(heldout) - 1) // context // batch, args.eval_batches)
        if count == 0:
            raise SystemExit(
                f"wanted at least {batch * context + 1} held-out tokens, got {len(heldout)}; take a smaller batch"
            )
        starts = torch.arange(count * batch, device=device).view(count, batch, 1) * context
        pieces = starts + torch.arange(context + 1, device=device)
        return sum(forward(heldout[index].long()).item() for index in pieces) / count

    args.out.mkdir(parents=True, exist_ok=True)
    log_file = (args.out / "training_log.csv").open("w", newline="")
    log = csv.writer(log_file)
    log.writerow(["step", "tokens", "seconds", "lr", "train_loss", "heldout_loss"])
    print(
        f"{args.size}: {parameters} parameters, {len(ids)} tokens, {batch * context} tokens a step, {device}",
        flush=True,
    )

    stream = batches(tokens, batch, context, torch.Generator().manual_seed(args.seed))
    deadline = started + 60 * args.minutes
    first = saved = time.monotonic()
    step, next_eval, done, losses = 0, args.eval_every, 0.0, []
    while done < 1.0:
        lr = learning_rate(size.lr, done)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = forward(next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss.detach())
        if step % 10 == 0 or step <= 2 or not cuda:
            losses[-1].item()  # wait for the device, so that the clock below tells the truth
        now = time.monotonic()
        if step == 1:
            first = now  # compilation is over: the schedule counts from here
            print(f"first step after {now - started:.1f} s", flush=True)
        done = step / args.steps if args.steps else (now - first) / max(deadline - first, 1e-9)
        if done >= next_eval or done >= 1.0:
            next_eval += args.eval_every
            mean, value = torch.stack(losses).float().mean().item(), heldout_loss()
            losses = []
            log.writerow(
                [
                    step,
                    step * batch * context,
                    f"{time.monotonic() - started:.1f}",
                    f"{lr:.3e}",
                    f"{mean:.4f}",
                    f"{value:.4f}",
                ]
            )
            log_file.flush()
            rate = step * batch * context / max(time.monotonic() - first, 1e-9)
            print(
                f"step {step}  {done:4.0%}  lr {lr:.2e}  train {mean:.4f}  held out {value:.4f}  {rate / 1e6:.2f} M tokens/s",
                flush=True,
            )
            if not math.isfinite(mean):
                raise SystemExit(
                    f"wanted a finite loss, got {mean} at step {step}; lower the learning rate of size {args.size}"
                )
            if time.monotonic() - saved > 60 * args.save_minutes or done >= 1.0:
                facts = dict(
                    size=args.size,
                    shape=asdict(size),
                    parameters=parameters,
                    steps=step,
                    batch=batch,
                    context=context,
                    tokens=step * batch * context,
                    epochs=round(step * batch * context / len(ids), 2),
                    seed=args.seed,
                    train_loss=round(mean, 4),
                    heldout_loss=round(value, 4),
                    finished=done >= 1.0,
                    seconds=round(time.monotonic() - started, 1),
                    torch=torch.__version__,
                    hardware=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
                )
                save_model(model, args.out, args.work / "tokenizer", args.max_shard)
                (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
                saved = time.monotonic()


# ---- what came of it -----------------------------------------------------------------------------------------------

PROMPTS = ["# SELECT\n\nThe SELECT statement", "In the beginning", "To create a new thread, call the function"]


def perplexity(model, ids, context: int = 512, stride: int = 256) -> tuple[float, int]:
    """Mean loss over sliding windows: after the first window, only the last `stride` tokens of each are counted, so that
    each of them sees at least context - stride - 1 tokens before it. Returns (mean loss, number of counted tokens)."""
    import torch
    import torch.nn.functional as F

    total, count, end = 0.0, 0, 1
    with torch.inference_mode():
        while end < len(ids):
            new = min(stride if count else context - 1, len(ids) - end)
            start = max(0, end + new - context)
            piece_1T = ids[None, start : end + new]
            logits_TV = model(input_ids=piece_1T).logits[0, :-1].float()
            total += F.cross_entropy(logits_TV[-new:], piece_1T[0, -new:], reduction="sum").item()
            count, end = count + new, end + new
    return total / count, count


def sample(model, tokenizer, prompt: str, **options) -> str:
    import torch

    torch.manual_seed(0)
    ids = tokenizer(END + prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, pad_token_id=1, **options)
    return tokenizer.decode(out[0, 1:], skip_special_tokens=True)


def card(args) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = args.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text).input_ids)
    loss, count = perplexity(model, ids)
    size_bytes = len(text.replace(END, "").encode())
    figures = dict(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss * count / (math.log(2) * size_bytes),
        tokens=count,
        bytes=size_bytes,
    )
    print(json.dumps(figures))
    samples = [
        (how, sample(model, tokenizer, prompt, **options))
        for prompt in PROMPTS
        for how, options in [
            ("greedy, repetition penalty 1.1", dict(do_sample=False, repetition_penalty=1.1)),
            ("temperature 0.7, top-p 0.9", dict(do_sample=True, temperature=0.7, top_p=0.9)),
        ]
    ]
    training = json.loads((args.model / "training.json").read_text())
    facts = json.loads((args.work / "corpus.json").read_text())
    (args.model / "README.md").write_text(card_text(training, facts, figures, samples), encoding="utf-8")


def card_text(training: dict, facts: dict, figures: dict, samples: list[tuple[str, str]]) -> str:
    shape = training["shape"]
    sources = "\n".join(
        f"| {s['package']} | {s['version']} | {s['licence']} | {s['bytes'] / 1e6:.2f} |" for s in facts["sources"]
    )
    quoted = "\n\n".join(f"{how}:\n\n" + "\n".join(f"    {line}" for line in text.split("\n")) for how, text in samples)
    return f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
---
# small_lm {training["size"]}

A language model of {training["parameters"] / 1e6:.2f} million parameters, trained from random weights by
`examples/train_small_lm.py` on free technical documentation. It is the yardstick of the quality figures of lowp: small enough to
lie in a repository and to be evaluated on one CPU core, and really trained, so that rounding its weights costs something. It is
no assistant and knows no facts.

| what | value |
| --- | --- |
| held-out loss, nats a token (`heldout.txt`, windows of 512, stride 256) | {figures["loss"]:.4f} |
| held-out perplexity, same | {figures["perplexity"]:.3f} |
| held-out bits per byte, same | {figures["bits_per_byte"]:.4f} |
| loss on the held-out set at the end of training (its full batches, sequences of {training["context"]}) \
| {training["heldout_loss"]:.4f} |
| training loss, mean of the last part | {training["train_loss"]:.4f} |
| steps, tokens a step | {training["steps"]}, {training["batch"] * training["context"]} |
| tokens seen, epochs | {training["tokens"] / 1e6:.0f} M, {training["epochs"]} |
| time, hardware | {training["seconds"]:.0f} s, {training["hardware"]}, torch {training["torch"]} |

The evaluation runs the bf16 weights in fp32 arithmetic. `heldout.txt` holds {figures["bytes"]} bytes,
{figures["tokens"]} predicted tokens; its documents are separated by `{END}`, which the tokenizer reads as its end
token, as in training.

## Model

`LlamaForCausalLM`: hidden {shape["hidden"]}, intermediate {shape["intermediate"]}, {shape["layers"]} layers,
{shape["heads"]} heads of 64, {shape["kv_heads"]} key/value heads, context {training["context"]}, embeddings tied,
vocabulary {VOCAB},
weights in bfloat16. All linear dimensions are multiples of 128. The tokenizer is a byte-level BPE trained on the
same text, digits
one by one; ids 0 and 1 are `{END}` and `{PAD}`. Text starts best after `{END}`.

## Training

AdamW (0.9, 0.95), weight decay 0.1 on matrices, gradient norm clipped at 1, peak learning rate {shape["lr"]:g}, warmup 2 %,
cosine to zero, no dropout, seed {training["seed"]}; fp32 master weights, bf16 autocast; packed sequences of
{training["context"]} tokens.
The schedule follows the clock, so another machine takes another number of steps: `--steps {training["steps"]}` repeats
this one, but for rounding.
`training_log.csv` is the log.

## Data

{facts["documents"]} documents, {facts["bytes"] / 1e6:.1f} MB, {facts["tokens"] / 1e6:.1f} M tokens; held out by the hash of the
document's name: {facts["heldout_documents"]} documents, {facts["heldout_bytes"] / 1e6:.2f} MB,
{facts["heldout_tokens"] / 1e6:.2f} M tokens. Pages of documentation packages of Debian 12 as plain text; indexes,
source listings and histories dropped. A paragraph
of at least 80 characters, case and punctuation aside, occurs once in the whole corpus, so no held-out paragraph of that length
is in training; of the held-out windows of 64 tokens, {facts["heldout_overlap"]:.1%} are (the boilerplate of reference pages).
The licences are those of the documentation, as the packages' copyright files state them. Debian's snapshot archive keeps the
versions below.

| package | version | licence | MB used |
| --- | --- | --- | --- |
{sources}

## Samples

{quoted}

## Again

    python examples/train_small_lm.py corpus --work build/lm
    python examples/train_small_lm.py train --work build/lm --size {training["size"]} --out build/lm/{training["size"]} \
--steps {training["steps"]}
    python examples/train_small_lm.py card --work build/lm --model build/lm/{training["size"]} --text build/lm/heldout.txt
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("corpus", help="fetch, clean, split, train the tokenizer, encode")
    p.add_argument("--work", type=Path, required=True)
    p.add_argument(
        "--cap-mb", type=int, default=8, help="at most this much text of a package, so that none drowns the others"
    )
    p.add_argument("--heldout-percent", type=int, default=2)
    p.add_argument("--processes", type=int, default=2)
    p.set_defaults(run=corpus)
    p = commands.add_parser("train", help="train a model on the encoded corpus")
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--size", choices=SIZES, default="8m")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=4.0, help="wall clock of the whole run, compilation included")
    p.add_argument("--steps", type=int, default=0, help="a fixed number of steps instead of --minutes")
    p.add_argument("--batch", type=int, default=128, help="sequences a step")
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--recipe", default="", help="train in low precision: float8_rowwise, mxfp8 ... (lowp.train.RECIPES)"
    )
    p.add_argument("--device", default="")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile, on CUDA only")
    p.add_argument("--eval-every", type=float, default=0.1, help="fraction of the run between held-out losses")
    p.add_argument("--eval-batches", type=int, default=8)
    p.add_argument("--save-minutes", type=float, default=1.0)
    p.add_argument("--max-shard", default="16MB")
    p.set_defaults(run=train)
    p = commands.add_parser("card", help="evaluate, sample, write the model card")
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--text", type=Path, required=True)
    p.set_defaults(run=card)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
