"""Everyday knowledge in four-choice form: true facts that a schoolchild or an adult commonly knows.

A small language model partly has them.  The wrong choices of a question are other answers of the
same relation, drawn with a fixed seed, so neither form nor length tells the right one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PATH = Path("data/benchmarks/common_knowledge/test-00000-of-00001.parquet")
SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("subject", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.int64()),
    ]
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
# Tables of "entity, entity: answer; entity: answer".
_CAPITALS = """
France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon;
the United Kingdom: London; Ireland: Dublin; Belgium: Brussels; Austria: Vienna;
the Netherlands: Amsterdam; Denmark: Copenhagen; Norway: Oslo; Sweden: Stockholm;
Finland: Helsinki; Iceland: Reykjavik; Poland: Warsaw; the Czech Republic: Prague;
Slovakia: Bratislava; Hungary: Budapest; Romania: Bucharest; Bulgaria: Sofia; Greece: Athens;
Serbia: Belgrade; Croatia: Zagreb; Russia: Moscow; Ukraine: Kyiv; Latvia: Riga; Estonia: Tallinn;
China: Beijing; Japan: Tokyo; South Korea: Seoul; North Korea: Pyongyang; India: New Delhi;
Pakistan: Islamabad; Afghanistan: Kabul; Nepal: Kathmandu; Bangladesh: Dhaka; Thailand: Bangkok;
Vietnam: Hanoi; the Philippines: Manila; Iran: Tehran; Iraq: Baghdad; Syria: Damascus;
Lebanon: Beirut; Jordan: Amman; Saudi Arabia: Riyadh; Qatar: Doha; Turkey: Ankara;
Egypt: Cairo; Kenya: Nairobi; Nigeria: Abuja; Ethiopia: Addis Ababa; Morocco: Rabat; Ghana: Accra;
Libya: Tripoli; Zimbabwe: Harare;
the United States: Washington; Canada: Ottawa; Cuba: Havana; Argentina: Buenos Aires;
Chile: Santiago; Peru: Lima; Colombia: Bogota; Venezuela: Caracas; Ecuador: Quito;
Uruguay: Montevideo; Australia: Canberra; New Zealand: Wellington
"""
# No country that is commonly said to reach into a second continent.
_CONTINENTS = """
Kenya, Nigeria, Ghana, Ethiopia, Uganda, Zambia, Zimbabwe, Angola, Mali, Algeria, Libya, Senegal,
Cameroon, Tanzania: Africa;
China, India, Japan, Thailand, Vietnam, Nepal, Iran, Iraq, Pakistan, Mongolia, South Korea,
Saudi Arabia, Cambodia, Afghanistan: Asia;
Germany, Ireland, Poland, Sweden, Finland, Austria, Hungary, Romania, Belgium, Switzerland,
Croatia, Bulgaria, Estonia, Ukraine: Europe;
Canada, Mexico, Cuba, Jamaica, Guatemala, Honduras, Nicaragua, Costa Rica, El Salvador, Haiti:
North America;
Brazil, Argentina, Peru, Bolivia, Colombia, Venezuela, Ecuador, Paraguay, Uruguay:
South America;
New Zealand, Fiji, Samoa, Tonga: Oceania
"""
_SYMBOLS = """
hydrogen: H; helium: He; lithium: Li; carbon: C; nitrogen: N; oxygen: O; fluorine: F; neon: Ne;
sodium: Na; magnesium: Mg; aluminum: Al; silicon: Si; phosphorus: P; sulfur: S; chlorine: Cl;
argon: Ar; potassium: K; calcium: Ca; titanium: Ti; chromium: Cr; iron: Fe; cobalt: Co;
nickel: Ni; copper: Cu; zinc: Zn; arsenic: As; bromine: Br; silver: Ag; tin: Sn; iodine: I;
tungsten: W; platinum: Pt; gold: Au; mercury: Hg; lead: Pb; radium: Ra; uranium: U; plutonium: Pu
"""
_ADJECTIVES = """
hot: cold; big: small; tall: short; fast: slow; happy: sad; old: young; rich: poor; strong: weak;
heavy: light; hard: soft; wet: dry; clean: dirty; full: empty; open: closed; true: false;
good: bad; early: late; noisy: quiet; deep: shallow; wide: narrow; thick: thin; high: low;
smooth: rough; sweet: sour; polite: rude; safe: dangerous; cheap: expensive; dead: alive;
easy: difficult; awake: asleep; guilty: innocent; public: private; male: female; first: last;
same: different; absent: present; simple: complex; near: far; tight: loose; wild: tame;
beautiful: ugly; brave: cowardly; odd: even; positive: negative; left: right
"""
_NOUNS = """
war: peace; friend: enemy; beginning: end; night: day; success: failure; victory: defeat;
question: answer; front: back; top: bottom; heaven: hell; north: south; east: west
"""
_VERBS = """
buy: sell; push: pull; win: lose; give: take; remember: forget; laugh: cry; arrive: leave;
start: stop; increase: decrease; accept: reject; lend: borrow; attack: defend; love: hate
"""
_YOUNG = """
dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; goat: kid; pig: piglet; bear: cub;
deer: fawn; duck: duckling; goose: gosling; chicken: chick; kangaroo: joey; frog: tadpole;
swan: cygnet; owl: owlet
"""
_SOUNDS = """
dog: bark; cat: meow; cow: moo; sheep: bleat; duck: quack; lion: roar; horse: neigh; pig: oink;
bee: buzz; snake: hiss; wolf: howl; owl: hoot; frog: croak; mouse: squeak; rooster: crow;
donkey: bray; turkey: gobble
"""
_KINDS = """
whale, horse, bat, elephant, kangaroo, rabbit, monkey, tiger: mammal;
penguin, eagle, ostrich, parrot, pigeon, hawk, swan, sparrow: bird;
salmon, shark, tuna, trout, cod, herring, goldfish: fish;
ant, butterfly, mosquito, beetle, wasp, grasshopper, moth: insect;
lizard, crocodile, tortoise, cobra, python: reptile
"""
_PASTS = """
go: went; eat: ate; see: saw; run: ran; come: came; take: took; give: gave; make: made; say: said;
tell: told; think: thought; bring: brought; buy: bought; catch: caught; teach: taught;
fight: fought; find: found; stand: stood; sit: sat; sleep: slept; keep: kept; feel: felt;
leave: left; meet: met; lose: lost; send: sent; spend: spent; build: built; bend: bent;
drink: drank; swim: swam; sing: sang; begin: began; write: wrote; ride: rode; drive: drove;
rise: rose; speak: spoke; steal: stole; break: broke; choose: chose; freeze: froze; fly: flew;
grow: grew; know: knew; throw: threw; blow: blew; draw: drew; fall: fell; hold: held; hear: heard;
have: had; do: did; win: won; get: got; forget: forgot; sell: sold; shake: shook; wear: wore;
bite: bit; hide: hid; feed: fed; lead: led; pay: paid; become: became; sweep: swept
"""

# subject -> (question with a place for the entity, table, width): the wrong choices are drawn from
# the `width` answers next to the right one in the alphabet (all if 0), which share its letters
# where a question's own letters would give the answer away.
_RELATIONS: dict[str, list[tuple[str, str, int]]] = {
    "capitals": [("What is the capital of {}?", _CAPITALS, 0)],
    "continents": [("On which continent is {}?", _CONTINENTS, 0)],
    "chemical_elements": [("What is the chemical symbol of {}?", _SYMBOLS, 9)],
    "opposites": [
        ("What is the opposite of {}?", table, 0) for table in (_ADJECTIVES, _NOUNS, _VERBS)
    ],
    "animals": [
        ("What is a baby {} called?", _YOUNG, 0),
        ("Which sound does the {} make?", _SOUNDS, 0),
        ("What kind of animal is the {}?", _KINDS, 0),
    ],
    "past_tense": [("What is the past tense of {}?", _PASTS, 9)],
}
# Answers alike enough for one to pass for another: none is a wrong choice where one is right.
_ALIKE = [
    set(line.split())
    for line in """
small short low narrow thin shallow light weak soft quiet slow poor empty
bad poor rude false negative sad ugly dirty
rude rough
cowardly weak soft
closed private
late last
sour dry
young present
difficult complex
failure defeat
end back bottom
take borrow lose
hate reject
calf fawn kid
chick duckling gosling cygnet owlet
bark howl
howl roar
oink squeak bark
meow hiss
hoot hiss bark squeak
croak bark quack squeak
gobble hiss
buzz hiss
bird reptile
""".strip().splitlines()
]

Fact = tuple[str, str, list[str]]  # question, answer, wrong choices to draw from


def _read(table: str) -> list[tuple[str, str]]:
    pairs = [pair.split(":") for pair in " ".join(table.split()).split(";")]
    return [(name.strip(), a.strip()) for names, a in pairs for name in names.split(",")]


def _relation(question: str, pairs: list[tuple[str, str]], width: int = 0) -> list[Fact]:
    """Ask each entity of a table; the wrong choices are the table's other answers."""
    values = sorted({answer for _, answer in pairs})
    width = width or len(values)
    facts = []
    for name, answer in pairs:
        at = max(min(values.index(answer) - width // 2, len(values) - width), 0)
        alike = set().union({name, answer}, *(line for line in _ALIKE if answer in line))
        wrong = [v for v in values[at : at + width] if v not in alike]
        facts.append((question.format(name), answer, wrong))
    return facts


def _arithmetic() -> list[Fact]:
    """Sixteen sums of each kind; the choices are four evenly spaced numbers, the answer at any."""
    rng = np.random.default_rng(7)
    facts: dict[str, Fact] = {}
    for word, most in {"plus": 50, "minus": 50, "times": 12, "divided by": 12}.items():
        wanted = len(facts) + 16
        while len(facts) < wanted:
            a, b = (int(n) for n in rng.integers(4, most + 1, 2))
            whole = a + b if most == 50 else a * b
            first, answer = (a, whole) if word in ("plus", "times") else (whole, a)
            step = int(rng.integers(1, 1 + min(3, (answer - 1) // 3)))
            lowest = answer - step * int(rng.integers(4))
            ladder = range(lowest, lowest + 4 * step, step)
            question = f"What is {first} {word} {b}?"
            facts[question] = question, str(answer), [str(n) for n in ladder if n != answer]
    return list(facts.values())


def _calendar() -> list[Fact]:
    days, months = _DAYS.split(), _MONTHS.split()

    def shifted(names: list[str], by: int) -> list[tuple[str, str]]:
        return [(name, names[(i + by) % len(names)]) for i, name in enumerate(names)]

    lengths = """
    April, June, September, November: 30 days; January, May, August, December: 31 days;
    February of a common year: 28 days; February of a leap year: 29 days
    """
    return [
        *_relation("Which day comes right after {}?", shifted(days, 1)),
        *_relation("Which day comes right before {}?", shifted(days, -1)),
        *_relation("Which day comes two days after {}?", shifted(days, 2)),
        *_relation("Which month comes right after {}?", shifted(months, 1)),
        *_relation("Which month comes right before {}?", shifted(months, -1)),
        *_relation(
            "Which is the {} month of the year?", list(zip(_ORDINALS.split(), months, strict=True))
        ),
        *_relation("How long is {}?", _read(lengths)),
    ]


def rows() -> list[dict]:
    """Make the benchmark: each question once, answers even over the places."""
    facts = {
        subject: [fact for q, table, n in relations for fact in _relation(q, _read(table), n)]
        for subject, relations in _RELATIONS.items()
    }
    back = [(symbol, name) for name, symbol in _read(_SYMBOLS)]
    facts["chemical_elements"] += _relation("Which element has the symbol {}?", back)
    facts |= {"arithmetic": _arithmetic(), "calendar": _calendar()}
    rng = np.random.default_rng(11)
    made = []
    for subject, asked in facts.items():
        places = rng.permutation(np.arange(len(asked)) % 4).tolist()
        for (question, answer, wrong), place in zip(asked, places, strict=True):
            choices = rng.choice(wrong, 3, replace=False).tolist()
            choices.insert(place, answer)
            made.append(
                {"question": question, "subject": subject, "choices": choices, "answer": place}
            )
    return [made[i] for i in rng.permutation(len(made))]


def main(path: Path = PATH) -> None:
    """Write the benchmark's parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows(), SCHEMA), path)
    print(f"{path}: {len(rows())} rows")


if __name__ == "__main__":
    main()
