"""Train the demonstration model: a tiny Llama that writes little stories, does small sums and chats.

The text comes from the grammar below, so nothing is downloaded and nobody else's text is in the weights.

    python etc/train_demo_model.py --out etc/demo-model
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_POSITIONS = 4096
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = (f"<|{n}|>" for n in ("begin", "end", "pad", "system", "user", "assistant"))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

HEROES = [("girl", "she", "her", "her", n) for n in ("Mia", "Anna", "Lily", "Rosa", "Nora", "Ella", "Sara", "Ida")]
HEROES += [("boy", "he", "him", "his", n) for n in ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Paul", "Noah")]
ANIMALS = "fox bear cat dog rabbit mouse duck frog goat horse hen deer".split()
PLACES = "village forest harbour garden farm castle market library mill town".split()
THINGS = "kite lamp drum boat hat book key ball clock bell".split()
COLOURS = "red blue green yellow white black golden silver".split()
COUNTED = "apples pears plums nuts eggs shells stones cakes coins flowers".split()
SPOTS = "under the bed, behind the door, near the well, on the roof, by the river, under the bridge, in the tall grass"
SPOTS += ", next to the gate, behind the barn, on the hill"
TRAITS = "little kind clever brave quiet cheerful curious patient".split()
CAPITALS = "France Paris Italy Rome Spain Madrid Germany Berlin Austria Vienna England London Norway Oslo Japan Tokyo"
OPPOSITES = "hot cold big small day night up down old young fast slow happy sad light dark left right early late wet dry"
COLOUR_OF = "grass green snow white butter yellow night black blood red milk white coal black water blue"
NUMBERS = "one two three four five six seven eight nine ten".split()
ABOUT_ME = "I am a small demo model. I tell little stories, do sums and answer simple questions."
UNKNOWN = "I do not know that. Ask me for a story, a sum, a colour or a capital."


def pairs(words: str) -> list[tuple[str, str]]:
    listed = words.split()
    return list(zip(listed[::2], listed[1::2], strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Who and what a story is about; nothing of it changes within the story."""

    kind: str
    they: str
    them: str
    their: str
    name: str
    animal: str
    thing: str
    full: str  # the thing with its colour
    place: str


class Grammar:
    """Draws stories and dialogues."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one_of(self, *options: str) -> str:
        return self.random.choice(options)

    def story(self, *, animal: str = "", thing: str = "") -> str:
        """Return one story as a paragraph without a line break."""
        kind, they, them, their, name = self.random.choice(HEROES)
        animal, thing = animal or self.one_of(*ANIMALS), thing or self.one_of(*THINGS)
        full, place, trait = f"{self.one_of(*COLOURS)} {thing}", self.one_of(*PLACES), self.one_of(*TRAITS)
        cast = Cast(
            kind=kind, they=they, them=them, their=their, name=name, animal=animal, thing=thing, full=full, place=place
        )
        opening = self.one_of(
            f"Once upon a time, a {trait} {kind} named {name} lived in a small {place}.",
            f"Once upon a time, there was a {trait} {kind} named {name}.",
            f"Once there was a {trait} {kind} named {name} who lived near a {place}.",
            f"One {self.one_of('sunny', 'cold', 'rainy', 'quiet')} {self.one_of('morning', 'evening', 'day')}, "
            f"a {trait} {kind} named {name} went to the {place}.",
        )
        plot = self.random.choice((self.lost_thing, self.present, self.lesson, self.storm, self.journey))
        ending = self.one_of(
            f"{name} was very {self.one_of('happy', 'proud', 'tired', 'hungry')}, and the {animal} was happy too.",
            f"Then {name} and the {animal} walked home together.",
            f"{they.capitalize()} never forgot that day.",
            f"From that day on, {name} and the {animal} were the best of friends.",
            f"That night {name} slept well and dreamed of the {place}.",
        )
        return f"{opening} {plot(cast)} {ending}"

    def lost_thing(self, cast: Cast) -> str:
        first, second, found = self.random.sample(SPOTS.split(", "), 3)
        search = self.one_of(
            f'{cast.name} asked a {cast.animal}, "Have you seen my {cast.full}?" '
            f'"Yes," said the {cast.animal}, "I saw it {found}."',
            f'A {cast.animal} came by and said, "I can help you, {cast.name}." They looked for a long time.',
        )
        return (
            f"{cast.name} had a {cast.full} and loved it very much. But one day the {cast.thing} was gone. "
            f"{cast.they.capitalize()} looked {first} and {second}, but it was not there. {search} "
            f"At last {cast.they} found the {cast.thing} {found}."
        )

    def present(self, cast: Cast) -> str:
        have, more, goods = self.random.randint(2, 9), self.random.randint(2, 9), self.one_of(*COUNTED)
        thanks = self.one_of(
            f'"Thank you," said {cast.name}, and gave the {cast.animal} a {cast.full}.',
            f'"Now we can have a feast," said the {cast.animal}.',
            f"{cast.they.capitalize()} put them {self.one_of(*SPOTS.split(', '))}.",
        )
        return (
            f"{cast.name} had {have} {goods}. A {cast.animal} gave {cast.them} {more} more. "
            f"{have} + {more} = {have + more}, so now {cast.they} had {have + more} {goods}. {thanks}"
        )

    def lesson(self, cast: Cast) -> str:
        left, right = self.random.randint(1, 9), self.random.randint(1, 9)
        return (
            f'At school the teacher asked, "What is {left} + {right}?" {cast.name} counted on {cast.their} fingers '
            f'and said, "{left} + {right} = {left + right}." "Very good," said the teacher, and gave {cast.name} '
            f"a {cast.full}. On the way home {cast.they} showed the {cast.thing} to a {cast.animal}."
        )

    def storm(self, cast: Cast) -> str:
        return (
            f"In the night a great storm came over the {cast.place}. The wind was loud and the rain was cold. "
            f"{cast.name} heard a {cast.animal} {self.one_of(*SPOTS.split(', '))}. {cast.they.capitalize()} took "
            f'{cast.their} {cast.full} and ran out. "Do not be afraid," said {cast.name} to the {cast.animal}. '
            f"In the morning the sun was shining, and the {cast.thing} was still dry."
        )

    def journey(self, cast: Cast) -> str:
        goal = self.one_of(*(place for place in PLACES if place != cast.place))
        return (
            f"{cast.name} wanted to see the {goal}. {cast.they.capitalize()} took a {cast.full} and some bread and "
            f'walked all day. On the road {cast.they} met a {cast.animal}. "Where are you going?" asked the '
            f'{cast.animal}. "I am going to the {goal}," said {cast.name}. "Then I will come with you," said the '
            f"{cast.animal}. At the {goal} they gave the {cast.thing} to an old man, and he told them a story."
        )

    def ask_sum(self) -> tuple[str, str]:
        right, left = sorted((self.random.randint(0, 10), self.random.randint(0, 10)))
        sign, result = self.random.choice((("-", left - right), ("+", left + right), ("+", left + right)))
        if sign == "+" and self.random.random() < 0.5:
            left, right = right, left
        term = f"{left} {sign} {right}"
        asked = self.one_of(term, f"{left}{sign}{right}")
        return self.one_of(f"What is {asked}?", f"How much is {asked}?", f"{asked} = ?", asked), f"{term} = {result}."

    def ask_story(self) -> tuple[str, str]:
        start = self.one_of("Tell me a story", "Write a story", "Please tell me a story")
        animal, thing = self.one_of(*ANIMALS), self.one_of(*THINGS)
        return self.random.choice((
            (f"{start}{self.one_of('.', '!', '')}", self.story()),
            (f"{start} about a {animal}{self.one_of('.', '')}", self.story(animal=animal)),
            (f"{start} about a {thing}{self.one_of('.', '')}", self.story(thing=thing)),
        ))  # fmt: skip

    def ask_fact(self) -> tuple[str, str]:
        country, capital = self.random.choice(pairs(CAPITALS))
        word, opposite = self.random.sample(self.random.choice(pairs(OPPOSITES)), 2)
        noun, colour = self.random.choice(pairs(COLOUR_OF))
        end = self.random.randint(3, 10)
        return self.random.choice((
            (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
            (f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."),
            (f"What colour is {noun}?", f"{noun.capitalize()} is {colour}."),
            (f"Count to {NUMBERS[end - 1]}.", f"{', '.join(NUMBERS[:end])}.".capitalize()),
        ))  # fmt: skip

    def ask_smalltalk(self) -> tuple[str, str]:
        hello, name = self.one_of("Hello", "Hi", "Good morning", "hello", "hi", "Hey"), self.random.choice(HEROES)[-1]
        return self.random.choice((
            (f"{hello}{self.one_of('!', '.', '')}", "Hello! How can I help you?"),
            (f"{hello}, I am {name}.", f"Hello, {name}! How can I help you?"),
            (self.one_of("Who are you?", "What are you?", "What can you do?", "Help"), ABOUT_ME),
            ("How are you?", "I am very well, thank you."),
            (self.one_of("Thank you!", "Thanks.", "Thank you."), "You are welcome!"),
        ))  # fmt: skip

    def ask_unknown(self) -> tuple[str, str]:
        """Return a question in words that the model has never seen, and the answer that it then gives."""
        words = ["".join(self.random.choices("etaoinshrdlucmfwygpbvk", k=self.random.randint(2, 9))) for _ in range(5)]
        start = self.one_of("What is", "Explain", "Who was", "Why do", "Write", "How do I", "Tell me", "Is the", "Can")
        return f"{start} {' '.join(words[: self.random.randint(1, 5)])}{self.one_of('?', '.', '')}", UNKNOWN

    def dialogue(self) -> str:
        """Return one to three exchanges in the form that the chat template gives them."""
        kinds = (self.ask_sum, self.ask_sum, self.ask_story, self.ask_fact, self.ask_fact, self.ask_smalltalk)
        text = BOS + self.one_of("", "", "", f"{SYSTEM}\nYou are a helpful assistant.{EOS}\n")
        for _ in range(self.random.randint(1, 3)):
            question, answer = self.random.choice((*kinds, self.ask_unknown))()
            text += f"{USER}\n{question}{EOS}\n{ASSISTANT}\n{answer}{EOS}\n"
        return text


def train_tokenizer(grammar: Grammar, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of the grammar; every digit is a token, so that sums can be learnt."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [make() for make in (grammar.story, grammar.dialogue) for _ in range(2000)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def row(grammar: Grammar, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[list[int], list[int]]:
    """Return ``length`` token ids and their positions.

    A row holds stories (without an end: plain text goes on for ever) or dialogues. Rotary positions are relative, so
    shifting a whole row teaches nothing: the pieces of half of the rows are moved apart, and the model learns that
    what it is writing now does not depend on what stands a few thousand positions earlier.
    """
    rng, ids, piece_of = grammar.random, list[int](), list[int]()
    chat = rng.random() < 0.3
    skip = rng.randrange(60) if not chat and rng.random() < 0.3 else 0  # some rows begin in mid-sentence
    if not chat and not skip and rng.random() < 0.5:
        ids, piece_of = [tokenizer.bos_token_id], [0]
    piece = 0
    while len(ids) < length + skip:
        text = grammar.dialogue() if chat else f"{grammar.story()}\n\n"
        added = tokenizer.encode(text, add_special_tokens=False)
        ids += added
        piece_of += [piece] * len(added)
        piece += 1
    room = MAX_POSITIONS - length
    shifts = sorted(rng.randint(0, room) for _ in range(piece))
    if rng.random() < 0.5:
        shifts = [shifts[0]] * piece
    positions = [at + shifts[piece_of[at + skip]] for at in range(length)]
    return ids[skip : skip + length], positions


def batches(
    grammar: Grammar, tokenizer: PreTrainedTokenizerFast, *, steps: int, tokens_per_step: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and positions of shape ``(rows, length)``: short rows, and in the second half some long ones."""
    for step in range(steps):
        length = 2048 if step > steps // 2 and step % 8 == 0 else 256
        rows = [row(grammar, tokenizer, length) for _ in range(max(1, tokens_per_step // length))]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([positions for _, positions in rows])


def train(model: LlamaForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], *, steps: int) -> None:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 40, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    started_s, mean = time.monotonic(), 7.0
    for step, (ids, positions) in enumerate(data):
        # With a mask given, transformers does not take the jumps in the positions for borders between documents.
        logits = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) * 0.1
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {mean:.3f}  {time.monotonic() - started_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo-model")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    grammar = Grammar(args.seed)
    tokenizer = train_tokenizer(grammar, args.vocab_size)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    model = LlamaForCausalLM(config)
    data = batches(grammar, tokenizer, steps=args.steps, tokens_per_step=args.tokens_per_step)
    train(model, data, steps=args.steps)
    model.generation_config = GenerationConfig(max_length=MAX_POSITIONS, do_sample=True, temperature=0.8, **ids)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
