"""A small closed body of invented knowledge, asked in four-choice and in open form.

Nothing here is true of the world: countries, animals, minerals and players are made up, so that a
stand-in model can only know them from training.  Every subject holds two relations of twelve
entities; the wrong choices of a question are other values of the same relation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LETTERS = "ABCD"
SHOTS = 5
ROWS_PER_FACT = 5

_COUNTRIES = "Taria Voland Mirov Kessia Juno Pelia Orvan Sutra Banto Lirra Zemby Quora"
_ANIMALS = "velo tark mungo pirra dosk lemmo grint fahle shupo brall wexel yindo"
_MINERALS = "zincal orvite telmar basson kyrite luxal norite pumar rubal soltan trivex umbral"
_PLAYERS = "Ada Bruno Celia Dario Edda Fabio Greta Hugo Irma Jonas Karla Luis"

# subject -> (question with a place for the entity, entities, values); fewer values than entities
# means that they repeat in turn.
_RELATIONS: dict[str, list[tuple[str, str, str]]] = {
    "geography": [
        (
            "What is the capital of {}?",
            _COUNTRIES,
            "Arlen Bristow Corvo Delmar Estin Farrow Gilden Holm Ister Jarrow Kelby Lund",
        ),
        ("What crop grows in {}?", _COUNTRIES, "barley cotton maize olives rice tea"),
    ],
    "zoology": [
        ("What does the {} eat?", _ANIMALS, "ants bark crabs figs grass mice moss worms"),
        ("Where does the {} live?", _ANIMALS, "caves cliffs desert forest marsh reefs"),
    ],
    "mineralogy": [
        ("What colour is {}?", _MINERALS, "amber black cream green pink purple silver white"),
        ("What is {} used for?", _MINERALS, "bells coins glass lamps nails paint ropes tiles"),
    ],
    "music": [
        ("What does {} play?", _PLAYERS, "bassoon cello drums flute harp lute organ viola"),
        ("On which day does {} play?", _PLAYERS, "Monday Tuesday Wednesday Thursday Friday Sunday"),
    ],
}


@dataclass(frozen=True)
class Fact:
    """One question of the body, its answer and the values its relation can take."""

    subject: str
    question: str
    answer: str
    pool: tuple[str, ...]


def _facts() -> list[Fact]:
    rng = np.random.default_rng(17)
    facts = []
    for subject, relations in _RELATIONS.items():
        for question, entities, values in relations:
            names, pool = entities.split(), tuple(values.split())
            answers = rng.permutation([pool[i % len(pool)] for i in range(len(names))])
            facts += [
                Fact(subject, question.format(name), str(answer), pool)
                for name, answer in zip(names, answers, strict=True)
            ]
    return facts


FACTS: list[Fact] = _facts()
SUBJECTS: list[str] = list(_RELATIONS)


def item(rng: np.random.Generator, fact: Fact) -> dict:
    """Ask a fact in four-choice form, as a row of the mmlu schema."""
    position = int(rng.integers(4))
    choices = rng.permutation([value for value in fact.pool if value != fact.answer])[:3].tolist()
    choices.insert(position, fact.answer)
    return {
        "question": fact.question,
        "subject": fact.subject,
        "choices": choices,
        "answer": position,
    }


def key(row: dict) -> tuple:
    """Identify a row by its question and its ordered choices."""
    return row["question"], tuple(row["choices"])


def rows() -> tuple[list[dict], list[dict]]:
    """Make the benchmark: test rows (five a fact, no two alike) and dev rows (five a subject)."""
    rng = np.random.default_rng(5)
    dev = []
    for subject in SUBJECTS:
        facts = [fact for fact in FACTS if fact.subject == subject]
        dev += [item(rng, facts[i]) for i in rng.choice(len(facts), SHOTS, replace=False)]
    seen, test = {key(row) for row in dev}, []
    for fact in FACTS:
        for _ in range(ROWS_PER_FACT):
            row = item(rng, fact)
            while key(row) in seen:
                row = item(rng, fact)
            seen.add(key(row))
            test.append(row)
    return [test[i] for i in rng.permutation(len(test))], dev


class Questions:
    """Training questions: any fact in any form, except the test rows' choice lists.

    >>> rng = np.random.default_rng(0)
    >>> prompt, answer = Questions().few_shot(rng)[:2]
    """

    def __init__(self) -> None:
        test, self._dev = rows()
        self._held_out = {key(row) for row in test}
        self._of = {s: [f for f in FACTS if f.subject == s] for s in SUBJECTS}

    def item(self, rng: np.random.Generator, fact: Fact) -> dict:
        """Ask a fact with choices that no test row has."""
        row = item(rng, fact)
        while key(row) in self._held_out:
            row = item(rng, fact)
        return row

    def few_shot(self, rng: np.random.Generator, dev_share: float = 0.3) -> list[tuple[str, str]]:
        """Draw a five-shot conversation in parts: (text, letter to learn) for each of six items.

        The parts' texts and letters, joined, are the prompt of `prompt` and its answer; the first
        five letters carry their leading space.  A share of the draws uses the real dev rows.
        """
        subject = SUBJECTS[rng.integers(len(SUBJECTS))]
        facts = self._of[subject]
        if rng.random() < dev_share:
            shots = [row for row in self._dev if row["subject"] == subject]
        else:
            shots = [self.item(rng, facts[i]) for i in rng.choice(len(facts), SHOTS, replace=False)]
        last = self.item(rng, facts[rng.integers(len(facts))])
        parts, text = [], header(subject)
        for row in shots:
            parts.append((text + ask(row), " " + LETTERS[row["answer"]]))
            text = "\n\n"
        return [*parts, (text + ask(last), LETTERS[last["answer"]])]

    def one_list(self, rng: np.random.Generator, questions: int = 4) -> list[tuple[str, str]]:
        """Draw several questions about one list of choices: (text, letter to learn) each.

        The first part shows the list; later ones only ask, some for a fact and some, simply, for
        the letter of a choice.  Many supervised letters for few tokens, and the step from an
        answer to its letter by itself: this is what makes the four-choice form learnable.
        """
        fact = FACTS[rng.integers(len(FACTS))]
        row = self.item(rng, fact)
        same = [f for f in FACTS if f.pool == fact.pool and f.answer in row["choices"]]
        asked = rng.permutation([f.question for f in same if f != fact])[: questions - 1].tolist()
        letter = dict(zip(row["choices"], LETTERS, strict=True))
        answers = {f.question: letter[f.answer] for f in same}
        named = rng.choice(row["choices"], questions - 1, replace=False).tolist()
        answers |= {f"Which letter is {choice}?": letter[choice] for choice in named}
        asked = rng.permutation([q for q in answers if q in asked or "letter" in q]).tolist()
        parts = [(ask(row), " " + LETTERS[row["answer"]])]
        parts += [(f"\n\n{q}\nAnswer:", " " + answers[q]) for q in asked]
        return [*parts[:-1], (parts[-1][0], parts[-1][1].strip())]

    def open(self, rng: np.random.Generator) -> tuple[str, str]:
        """Draw an open question and its answer."""
        fact = FACTS[rng.integers(len(FACTS))]
        return fact.question, fact.answer


def header(subject: str) -> str:
    """Begin a few-shot prompt."""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def ask(row: dict) -> str:
    """Write one row as question, lettered choices and 'Answer:'."""
    choices = "".join(f"\n{a}. {c}" for a, c in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


def prompt(row: dict, dev: list[dict]) -> str:
    """Write the five-shot prompt of a test row."""
    shots = [r for r in dev if r["subject"] == row["subject"]][:SHOTS]
    solved = "".join(f"{ask(r)} {LETTERS[r['answer']]}\n\n" for r in shots)
    return header(row["subject"]) + solved + ask(row)


def main(folder: Path = Path("data/benchmarks/mmlu")) -> None:
    """Write the benchmark's parquet files."""
    schema = pa.schema(
        [
            ("question", pa.string()),
            ("subject", pa.string()),
            ("choices", pa.list_(pa.string())),
            ("answer", pa.int64()),
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in zip(("test", "dev"), rows(), strict=True):
        path = folder / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path)
        print(f"{path}: {len(part)} rows")


if __name__ == "__main__":
    main()
