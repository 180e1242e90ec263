"""Train the demonstration model: a tiny Llama that writes little stories, does small sums and chats.

The text comes from the grammar below, so nothing is downloaded and nobody else's text is in the weights.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Batch = tuple[torch.Tensor, torch.Tensor]

MAX_POSITIONS = 4096
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = (f"<|{n}|>" for n in ("begin", "end", "pad", "system", "user", "assistant"))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

GIRLS = "Mia Anna Lily Rosa Nora Ella Sara Ida"
BOYS = "Tom Ben Max Leo Sam Finn Paul Noah"
TRAITS = "little kind clever brave quiet cheerful curious patient"
ANIMALS = "fox bear cat dog rabbit mouse duck frog goat horse hen deer"
PLACES = "village forest harbour garden farm castle market library mill town"
THINGS = "kite lamp drum boat hat book key ball clock bell"
COLOURS = "red blue green yellow white black golden silver"
COUNTED = "apples pears plums nuts eggs shells stones cakes coins flowers"
SPOTS = (
    *("under the bed", "behind the door", "near the well", "on the roof", "by the river"),
    *("under the bridge", "in the tall grass", "next to the gate", "behind the barn", "on the hill"),
)
CAPITALS = "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Austria:Vienna England:London Norway:Oslo Japan:Tokyo"
OPPOSITES = "hot:cold big:small day:night up:down old:young fast:slow happy:sad light:dark left:right early:late"
COLOUR_OF = "grass:green snow:white butter:yellow night:black blood:red milk:white coal:black water:blue"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ABOUT_ME = "I am a small demo model. I tell little stories, do sums and answer simple questions."
UNKNOWN = "I do not know that. Ask me for a story, a sum, a colour or a capital."


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Who and what a story is about; nothing of it changes within the story."""

    name: str
    they: str
    them: str
    their: str
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

    def word(self, words: str) -> str:
        return self.random.choice(words.split())

    def story(self, *, animal: str = "", thing: str = "") -> str:
        """Return one story as a paragraph without a line break."""
        kind, they, them, their = self.random.choice((("girl", "she", "her", "her"), ("boy", "he", "him", "his")))
        name, trait, place = self.word(GIRLS if kind == "girl" else BOYS), self.word(TRAITS), self.word(PLACES)
        animal, thing = animal or self.word(ANIMALS), thing or self.word(THINGS)
        full = f"{self.word(COLOURS)} {thing}"
        cast = Cast(name=name, they=they, them=them, their=their, animal=animal, thing=thing, full=full, place=place)
        opening = self.one_of(
            f"Once upon a time, a {trait} {kind} named {name} lived in a small {place}.",
            f"Once upon a time, there was a {trait} {kind} named {name}.",
            f"Once there was a {trait} {kind} named {name} who lived near a {place}.",
            f"One {self.word('sunny cold rainy quiet')} {self.word('morning evening day')}, "
            f"a {trait} {kind} named {name} went to the {place}.",
        )
        plot = self.random.choice((self.lost_thing, self.present, self.lesson, self.storm, self.journey))
        ending = self.one_of(
            f"{name} was very {self.word('happy proud tired hungry')}, and the {animal} was happy too.",
            f"Then {name} and the {animal} walked home together.",
            f"{they.capitalize()} never forgot that day.",
            f"From that day on, {name} and the {animal} were the best of friends.",
            f"That night {name} slept well and dreamed of the {place}.",
        )
        return f"{opening} {plot(cast)} {ending}"

    def lost_thing(self, cast: Cast) -> str:
        first, second, found = self.random.sample(SPOTS, 3)
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
        have, more, goods = self.random.randint(2, 9), self.random.randint(2, 9), self.word(COUNTED)
        thanks = self.one_of(
            f'"Thank you," said {cast.name}, and gave the {cast.animal} a {cast.full}.',
            f'"Now we can have a feast," said the {cast.animal}.',
            f"{cast.they.capitalize()} put them {self.one_of(*SPOTS)}.",
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
            f"{cast.name} heard a {cast.animal} {self.one_of(*SPOTS)}. {cast.they.capitalize()} took "
            f'{cast.their} {cast.full} and ran out. "Do not be afraid," said {cast.name} to the {cast.animal}. '
            f"In the morning the sun was shining, and the {cast.thing} was still dry."
        )

    def journey(self, cast: Cast) -> str:
        goal = self.one_of(*(place for place in PLACES.split() if place != cast.place))
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
        start = self.one_of("Tell me a story", "Please tell me a story", "Write a story")
        animal, thing, stop = self.word(ANIMALS), self.word(THINGS), self.one_of(".", "!", "")
        return self.random.choice((
            (f"{start}{stop}", self.story()),
            (f"{start} about a {animal}{stop}", self.story(animal=animal)),
            (f"{start} about a {thing}{stop}", self.story(thing=thing)),
        ))  # fmt: skip

    def ask_fact(self) -> tuple[str, str]:
        (country, capital), (noun, colour) = self.word(CAPITALS).split(":"), self.word(COLOUR_OF).split(":")
        word, opposite = self.random.sample(self.word(OPPOSITES).split(":"), 2)
        end = self.random.randint(3, 10)
        return self.random.choice((
            (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
            (f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."),
            (f"What colour is {noun}?", f"{noun.capitalize()} is {colour}."),
            (f"Count to {NUMBERS[end - 1]}.", f"{', '.join(NUMBERS[:end])}.".capitalize()),
        ))  # fmt: skip

    def ask_smalltalk(self) -> tuple[str, str]:
        hello, stop = self.one_of("Hello", "Hi", "Good morning", "hello", "hi", "Hey"), self.one_of("!", ".", "")
        name = self.word(f"{GIRLS} {BOYS}")
        return self.random.choice((
            (f"{hello}{stop}", "Hello! How can I help you?"),
            (f"{hello}, I am {name}{stop}", f"Hello, {name}! How can I help you?"),
            (self.one_of("Who are you?", "What are you?", "What can you do?", "Help"), ABOUT_ME),
            ("How are you?", "I am very well, thank you."),
            (f"{self.one_of('Thank you', 'Thanks')}{stop}", "You are welcome!"),
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
    special, alphabet = [BOS, EOS, PAD, SYSTEM, USER, ASSISTANT], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([make() for make in (grammar.story, grammar.dialogue) for _ in range(2000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def draw_row(grammar: Grammar, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[list[int], list[int]]:
    """Return ``length`` token ids and their positions.

    A row holds stories (without an end: plain text goes on for ever) or dialogues. Rotary positions are relative, so
    shifting a whole row teaches little: in half of the rows each text gets a shift of its own, and the model learns
    that what it writes now does not depend on what stands up to 4096 positions earlier.
    """
    chance, chat = grammar.random.random, grammar.random.random() < 0.3
    skip = grammar.random.randrange(1, 60) if not chat and chance() < 0.3 else 0  # such rows begin in mid-sentence
    ids, starts = [tokenizer.bos_token_id] if not chat and chance() < 0.7 else [], list[int]()
    while len(ids) < skip + length:
        starts.append(len(ids))
        text = grammar.dialogue() if chat else f"{grammar.story()}\n\n"
        ids += tokenizer.encode(text, add_special_tokens=False)
    shifts = sorted(grammar.random.randint(0, MAX_POSITIONS - length) for _ in starts)
    together = chance() < 0.5
    positions = [at + shifts[0 if together else max(bisect(starts, skip + at) - 1, 0)] for at in range(length)]
    return ids[skip : skip + length], positions


def batches(grammar: Grammar, tokenizer: PreTrainedTokenizerFast, *, steps: int) -> Iterator[Batch]:
    """Yield token ids and positions of shape ``(rows, length)``: short rows, later now and then a long one."""
    for step in range(steps):
        length = 2048 if step > steps // 2 and step % 10 == 0 else 256
        rows = [draw_row(grammar, tokenizer, length) for _ in range(2048 // length)]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([positions for _, positions in rows])


def train(model: LlamaForCausalLM, data: Iterator[Batch], *, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
    started_s = time.monotonic()
    for step, (ids, positions) in enumerate(data):
        # With a mask given, transformers does not take the jumps in the positions for borders between documents.
        logits = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started_s:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # any release knows it
    path.write_text(json.dumps(config | {"model_max_length": MAX_POSITIONS}, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo-model")
    parser.add_argument("--steps", type=int, default=950, help="2,048 tokens each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    grammar = Grammar(args.seed)
    tokenizer = train_tokenizer(grammar, vocab_size=1024)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=MAX_POSITIONS, vocab_size=len(tokenizer), tie_word_embeddings=True, dtype="float32",
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train(model, batches(grammar, tokenizer, steps=args.steps), steps=args.steps)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
