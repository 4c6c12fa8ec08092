"""The stories of the task `word-problems`, and the words that they are told in.

In a story's texts `(now|then)` stands for one of the two, `{A}`, `{B}` and `{C}` are people (`{A.he}`, `{A.him}`,
`{A.his}`), other names in braces are the story's numbers and slots (`{x}` marbles, `{x.one}` marble, `{x.a}` a marble).
In a solution `[n: a + b]` is a step of work: it becomes "3 + 5 = 8", and 8 is `n` from there on. The last step gives
the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Story:
    """One body, told in one of several ways, and questions about it, each with its solution."""

    name: str
    numbers: str
    """Comma-separated: `a=2..60` is any of these, `a=2..60..900` sometimes up to 900, `t=a*b` follows from others."""
    bodies: Sequence[str]
    asks: Mapping[str, str]
    slots: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    where: str = "True"
    """What the numbers must fulfil besides; that each step of the solution gives a whole number need not be said."""


@dataclass(frozen=True)
class Person:
    name: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Noun:
    """Printed in the plural.

    >>> x = Noun("apricot", "apricots")
    >>> f"{x}, {x.one}, {x.a}"
    'apricots, apricot, an apricot'
    """

    one: str
    many: str

    def __str__(self) -> str:
        return self.many

    @property
    def a(self) -> str:
        return f"{'an' if self.one[0] in 'aeiou' else 'a'} {self.one}"


def _nouns(text: str) -> tuple[Noun, ...]:
    """Comma-separated nouns; `peach:peaches` where the plural is not made with a plain s."""
    pairs = (word.strip().partition(":") for word in text.split(","))
    return tuple(Noun(one, many or one + "s") for one, _, many in pairs)


_WOMEN = (
    "Ada Alma Amara Bella Carmen Clara Dina Elena Esther Fatima Freya Gloria Hana Ida Ingrid Jamila Joan Kira Leila "
    "Lucia Mei Mina Nadia Nora Olga Petra Priya Rosa Ruth Sofia Tessa Uma Vera Wanda Yuki Zoe"
)
_MEN = (
    "Adam Ahmed Ali Arun Bruno Carl Chen Diego Dmitri Emil Felix Finn George Hugo Ivan Jamal Jonah Kofi Leo Liam Marek "
    "Mateo Milan Omar Oscar Pablo Paul Rafael Ravi Sam Sven Tariq Tom Victor Walter Yusuf Zane"
)
PEOPLE = (
    *(Person(name, "she", "her", "her") for name in _WOMEN.split()),
    *(Person(name, "he", "him", "his") for name in _MEN.split()),
)

TOYS = _nouns(
    "marble, sticker, stamp, toy car, postcard, coin, badge, comic, bead, button, key ring, trading card, seashell, "
    "pebble, magnet, puzzle, wooden block, plastic dinosaur, yo-yo, board game, poster"
)
FLAT = _nouns("sticker, stamp, postcard, trading card, photo, pressed flower, concert ticket, picture")
FRUIT = _nouns("apple, pear, plum, orange, peach:peaches, lemon, mango:mangoes, apricot, fig, lime, kiwi, banana")
BAKED = _nouns("cookie, muffin, cupcake, bun, pretzel, brownie:brownies, waffle, bagel, scone, bread roll, pie")
VEGETABLES = _nouns("carrot, potato:potatoes, onion, pepper, tomato:tomatoes, cucumber, turnip, leek, cabbage, pumpkin")
FARM = _nouns("cow, goat, hen, duck, horse, sheep:sheep, rabbit, pig, donkey, turkey")
BIRDS = _nouns("sparrow, pigeon, crow, gull, robin, finch:finches, swallow, duck, goose:geese, starling")
SCHOOL = _nouns("pencil, pen, crayon, eraser, notebook, marker, ruler, folder, paintbrush:paintbrushes, glue stick")
FLOWERS = _nouns("tulip, rose, daisy:daisies, lily:lilies, sunflower, daffodil, carnation, iris:irises, poppy:poppies")
TREES = _nouns("maple, pine, oak, birch:birches, cherry tree, apple tree, willow, elm, cedar, walnut tree")
BOXES = _nouns("box:boxes, bag, basket, jar, crate, tray, carton, bucket, bowl, tin, packet")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "grey")
GOODS = _nouns("mug, lamp, scarf:scarves, cushion, umbrella, hat, vase, belt, wallet, blanket, plate, clock, backpack")
FRAGILE = _nouns("mug, lamp, vase, plate, bowl, wine glass:wine glasses, teapot, mirror, egg, light bulb, flowerpot")
SMALL_GOODS = _nouns(
    "pen, candle, card, bookmark, bar of soap:bars of soap, ribbon, spoon, light bulb, sponge, pocket map, whistle"
)
CROWD = _nouns("child:children, student, visitor, tourist, hiker, guest, dancer, singer, player, teacher, swimmer")
MEDIA = _nouns("photo, song, video, message, game, recording, drawing, document")
DRINKS = _nouns("cup of tea:cups of tea, glass of juice:glasses of juice, cup of cocoa:cups of cocoa, milkshake")
BOOKS = _nouns("novel, cookbook, comic book, magazine, atlas:atlases, picture book, dictionary:dictionaries, storybook")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("library", "museum", "zoo", "theatre", "stadium", "market", "town hall", "swimming pool", "park", "fair")
RELATIVES = ("sister", "brother", "cousin", "aunt", "uncle", "neighbour", "grandmother", "grandfather", "friend")

_JOINING = (
    Story(
        "gift",
        "a=2..70..900, b=2..50..400, c=6..15",
        (
            "{A} (has|owns) {a} {x}. {B} (gives|brings|sends) {A.him} {b} more.(|| {B} is {c} years old.)",
            "{B} gave {A} {b} {x}. Before that, {A} (had|owned) {a} {x}.",
            "(On {A.his} birthday|Yesterday) {A} got {b} {x} from {A.his} {r}. {A} already had {a} {x}"
            "(| and {c} {y}) (at home|in {A.his} room).",
        ),
        {
            "How many {x} does {A} have (now|in all|altogether)?": "{A} (now has|has) [a + b] {x}.",
            "What is the number of {x} that {A} has now?": "The two numbers add up to [a + b] {x}.",
        },
        {"x": TOYS, "y": TOYS, "r": RELATIVES},
    ),
    Story(
        "two containers",
        "a=2..60..700, b=2..60..700, c=2..40",
        (
            "There are {a} {x} in the {p} {k.one} and {b} {x} in the {q} {k.one}.",
            "{A} (keeps|stores|puts) {x} in two {k}. The {p} one holds {a} {x}, the {q} one {b}.",
            "A {p} {k.one} has {a} {x} (inside|in it). A {q} {k.one} has {b} {x} and {c} {y} (inside|in it).",
        ),
        {
            "How many {x} are there (in all|altogether|in total)?": "Together that makes [a + b] {x}.",
            "How many {x} are in the two {k} together?": "The {k} hold [a + b] {x} together.",
            "How many more {x} are in the {p} {k.one} than in the {q} one?": "The difference is [a - b] {x}.",
            "How many fewer {x} are in the {p} {k.one} than in the {q} one?": "The difference is [b - a] {x}.",
        },
        {"x": TOYS, "y": SCHOOL, "k": BOXES, "p": COLOURS, "q": COLOURS},
    ),
    Story(
        "car park",
        "a=3..60..500, b=2..40..300, c=2..20",
        (
            "At {h} o'clock {a} cars and {c} (vans|motorbikes) stood outside the {place}. Then {b} more cars came.",
            "{b} cars drove into a car park (|near the {place} )where {a} cars were standing already.",
            "A car park had {a} cars in it. (An hour later|After lunch) {b} more cars drove in, and nobody left.",
        ),
        {"How many cars are there now?": "Now there are [a + b] cars."},
        {"place": PLACES, "h": ("nine", "ten", "eleven", "two", "three")},
    ),
    Story(
        "fruit picking",
        "a=4..60..400, b=3..50..300, c=3..40..200",
        (
            "{A} picked {a} {x}, {b} {y} and {c} {z} (in the orchard|on {day}|this week).",
            "In the orchard {A} filled one basket with {a} {x}, one with {b} {y} and one with {c} {z}.",
            "{A}'s {k.one} holds {a} {x}. {B}'s {k.one} holds {b} {y} and {c} {z}.",
        ),
        {
            "How many pieces of fruit are there in all?": "Altogether there are [a + b + c] pieces of fruit.",
            "How many {x} and {z} are there together?": "Leaving out the {y}, there are [a + c] pieces of fruit.",
            "How many {y} and {z} are there together?": "There are [b + c] {y} and {z}.",
            "How many more {x} than {y} are there?": "The difference is [a - b].",
            "How many more {x} are there than {y} and {z} together?": (
                "There are [n: b + c] {y} and {z}. The difference is [a - n]."
            ),
        },
        {"x": FRUIT, "y": FRUIT, "z": FRUIT, "day": DAYS, "k": BOXES},
    ),
    Story(
        "birds on the lake",
        "a=2..40..200, b=2..30..150, c=2..30..100",
        (
            "{a} {x} were (resting|sitting) by the lake. Then {b} more {x} and {c} {y} came (flying|along).",
            "(Early in the day|At dawn) {A} saw {a} {x} on a field. By noon {b} more {x} and {c} {y} had joined them.",
        ),
        {
            "How many {x} are there now?": "There are now [a + b] {x}. The {y} do not count.",
            "How many birds are there now?": "Altogether there are [a + b + c] birds.",
            "How many birds came later?": "Later, [b + c] birds came.",
            "How many more {x} than {y} are there now?": (
                "Now there are [n: a + b] {x}. Compared with the {y}, that is [n - c] more."
            ),
        },
        {"x": BIRDS, "y": BIRDS},
    ),
    Story(
        "three days",
        "a=5..60..500, b=5..60..500, c=5..60..500",
        (
            "{A} (walked|ran|cycled) for {a} minutes on {d}, {b} minutes on {e} and {c} minutes on {f}.",
            "{A} practises the (piano|violin|drums). Last week {A.he} played {a} minutes on {d}, {b} minutes on {e} "
            "and {c} minutes on {f}.",
        ),
        {
            "For how many minutes was that (in all|in total|altogether)?": "In all that is [a + b + c] minutes.",
            "For how many minutes was that on {d} and {f} together?": "On these two days that is [a + c] minutes.",
            "How many minutes longer was it on {e} than on {d}?": "The difference is [b - a] minutes.",
            "How many fewer minutes was it on {f} than on {d}?": "The difference is [a - c] minutes.",
        },
        {"d": DAYS[:2], "e": DAYS[2:4], "f": DAYS[4:]},
    ),
    Story(
        "rope pieces",
        "a=3..40..300, b=3..40..300, c=2..20",
        (
            "{A} ties two ropes (together|into one). One is {a} metres long and the other {b} metres.",
            "One piece of (string|rope|cable) is {a} metres long, another is {b} metres long.(|| Each cost ${c}.)",
        ),
        {
            "How many metres is that in all?": "The two are [a + b] metres long together.",
            "How many metres longer is the first than the second?": "The difference is [a - b] metres.",
        },
    ),
    Story(
        "audience",
        "a=12..90..900, b=12..90..900, c=8..60..400",
        (
            "{a} women, {b} men and {c} children (came to|visited) the {place} on {d}.",
            "On {d}, the visitors of the {place} were {a} women, {b} men and {c} children.",
        ),
        {
            "How many (adults|grown-ups) were there?": "The adults were [a + b] people.",
            "How many people were there (altogether|in all)?": "Altogether there were [a + b + c] people.",
            "How many more women than men were there?": "The difference is [a - b].",
            "How many more adults than children were there?": "There were [n: a + b] adults. That is [n - c] more.",
        },
        {"place": PLACES, "d": DAYS},
    ),
)

_TAKING_AWAY = (
    Story(
        "market stall",
        "a=20..99..900, b=4..60..500, c=2..40..300, d=2..15",
        (
            "{A} took {a} {x} and {d} {y} to the market. {A.he} sold {b} {x} in the morning and {c} later.",
            "A stall had {a} {x}. (On {day}|First) {b} of them were sold, then another {c}.",
        ),
        {
            "How many {x} were left?": "In all [n: b + c] {x} were sold. That leaves [a - n] {x}.",
            "How many {x} were left (when the first {b}|after the first {b}) were sold?": "That leaves [a - b] {x}.",
            "How many {x} were sold?": "In all [b + c] {x} were sold.",
        },
        {"x": VEGETABLES, "y": FRUIT, "day": DAYS},
        where="a > b + c",
    ),
    Story(
        "eaten",
        "a=6..60..300, b=2..30..150, c=2..20",
        (
            "{A} baked {a} {x}. {A.his} (guests|friends|cousins) ate {b} of them(| and drank {c} glasses of milk).",
            "There were {a} {x} on the table. (The children|Some guests|{A} and {A.his} friends) ate {b} of them.",
            "Out of {a} {x}, {b} (have been|were) eaten.",
        ),
        {
            "How many {x} are left?": "That leaves [a - b] {x}.",
            "How many {x} (remain|are still there)?": "What remains is [a - b] {x}.",
        },
        {"x": BAKED},
    ),
    Story(
        "lost on the way",
        "a=10..80..600, b=2..50..200, c=5..40",
        (
            "{A} had {a} {x} but lost {b} of them on {A.his} way (home|to school|to {B}'s house).",
            "{A} (collected|owned) {a} {x}. One day {A.he} lost {b} of them(| during a walk of {c} minutes).",
            "{A} lost {b} of {A.his} {a} {x}. {B} has {c} {x}.",
        ),
        {
            "How many {x} does {A} (still have|have left)?": "{A} still has [a - b] {x}.",
            "How many {x} does {A} have now?": "{A} now has [a - b] {x}.",
        },
        {"x": TOYS},
    ),
    Story(
        "library",
        "a=30..99..900, b=5..60..400, c=3..50..300",
        (
            "A shelf in the library holds {a} {x}. On {d} {b} of them are lent out(|, and {c} {y} too).",
            "The library (has|owns) {a} {x} and {c} {y}. Readers have borrowed {b} of the {x}.",
        ),
        {
            "How many {x} are still in the library?": "The library still has [a - b] {x}.",
            "How many {x} are not lent out?": "Those lent out are taken away: [a - b] {x}.",
        },
        {"x": BOOKS, "y": BOOKS, "d": DAYS},
    ),
    Story(
        "bus stop",
        "a=8..60, b=2..30, c=2..25, d=3..20",
        (
            "A bus has {a} passengers. At (the next|a) stop {b} get off and {c} get on.",
            "{a} people are on a (tram|bus|train). When it stops, {b} people leave it and {c} new ones (enter|get in).",
            "Bus number {d} leaves with {a} people. At the first stop {b} of them get off and {c} others get on.",
        ),
        {
            "How many people are on it now?": "Of the first {a}, [n: a - b] stay. With the new ones that is [n + c].",
            "How many of those from the start are still on it?": "Of the first {a}, [a - b] stay.",
        },
        where="a > b + 1",
    ),
    Story(
        "phone memory",
        "a=20..99..900, b=5..70..600, c=4..50..300, e=2..40..200",
        (
            "{A}'s phone (had|held) {a} {x} and {c} {y}. {A} deleted {b} of the {x} and {e} of the {y}.",
            "{A} cleans up {A.his} tablet with {a} {x} and {c} {y} on it. {A.he} deletes {b} {x} and {e} {y}.",
        ),
        {
            "How many {x} are left?": "Only the {x} count. That leaves [a - b] {x}.",
            "How many {y} are left?": "Only the {y} count. That leaves [c - e] {y}.",
            "How many {x} and {y} were deleted altogether?": "Altogether [b + e] of them were deleted.",
            "How many more {x} than {y} were deleted?": "The difference is [b - e].",
            "How many {x} and {y} were there before?": "Before, there were [a + c] of them.",
        },
        {"x": MEDIA, "y": MEDIA},
        where="a > b + 1 and c > e + 1",
    ),
    Story(
        "purse",
        "a=15..99..800, b=3..60..400, c=2..30..150",
        (
            "{A} had ${a}. {A.he} (paid|spent) ${b} for {x.a} and ${c} for {y.a}.",
            "{A} (bought|chose) {x.a} for ${b} and {y.a} for ${c}. {A.he} (had|came with) ${a}.",
            "With ${a} in {A.his} pocket, {A} went to the shop and bought {x.a} for ${b} and {y.a} for ${c}.",
        ),
        {
            "How many dollars (are left|does {A} have left)?": (
                "{A} spent [n: b + c] dollars. That leaves [a - n] dollars."
            ),
            "How (much money|many dollars) did {A} spend?": "{A} spent [b + c] dollars.",
            "How many dollars more did the {x.one} cost than the {y.one}?": "The difference is [b - c] dollars.",
        },
        {"x": GOODS, "y": GOODS},
        where="a > b + c",
    ),
    Story(
        "candle",
        "a=10..60..300, b=2..30..150, c=2..9",
        (
            "A candle is {a} centimetres long. (|In {c} hours )it gets {b} centimetres shorter.",
            "{A} has a ribbon of {a} centimetres and cuts off {b} centimetres.",
        ),
        {"How many centimetres (are left|long is it then)?": "It is now [a - b] centimetres long."},
    ),
    Story(
        "broken",
        "n=3..12..30, k=4..12..40, b=2..30",
        (
            "{n} (crates|parcels) with {k} {x} each (were delivered to|arrive at) a shop. {b} {x} have cracks.",
            "A shop gets {n} boxes of {x}, {k} in each. {b} {x} turn out to be (broken|damaged).",
        ),
        {
            "How many {x} are (whole|undamaged)?": (
                "The shop got [t: n * k] {x}. Without the bad ones that is [t - b] {x}."
            ),
            "How many {x} did the shop get?": "The shop got [n * k] {x}.",
        },
        {"x": FRAGILE},
    ),
)

_COMPARING = (
    Story(
        "more than",
        "a=3..70..800, b=2..40..300, c=4..50",
        (
            "{A} has {a} {x}. {B} has {b} more {x} than {A}.(|| {C} has {c} {y}.)",
            "{B} (owns|has) {b} more {x} than {A}, who (owns|has) {a}.",
            "{A} has {a} {x}, and {B} has {b} more (than that|than {A.he}).",
        ),
        {
            "How many {x} does {B} have?": "{B} has [a + b] {x}.",
            "How many {x} do {A} and {B} have (together|in all)?": (
                "{B} has [n: a + b] {x}. Together they have [a + n] {x}."
            ),
        },
        {"x": TOYS, "y": TOYS},
    ),
    Story(
        "fewer than",
        "a=8..80..800, b=2..50..400, c=4..50",
        (
            "{A} has {a} {x}. {B} has {b} fewer {x} than {A}.(|| {C} has {c} {y}.)",
            "{B} (owns|has) {b} fewer {x} than {A}, who (owns|has) {a}.",
            "{A} has {a} {x}, and {B} has {b} fewer.",
        ),
        {
            "How many {x} does {B} have?": "{B} has [a - b] {x}.",
            "How many {x} do {A} and {B} have (together|in all)?": (
                "{B} has [n: a - b] {x}. Together they have [a + n] {x}."
            ),
        },
        {"x": TOYS, "y": TOYS},
        where="a > b + 1",
    ),
    Story(
        "that is more than the other",
        "a=8..80..800, b=2..50..400, c=2..9",
        (
            "{A} collected {a} {x}(| in {c} hours). That is {b} more than {B} collected.",
            "{A}, who collected {a} {x}, has {b} more than {B}.",
        ),
        {
            "How many {x} (does {B} have|did {B} collect)?": "{B} has {b} fewer than {A}: [a - b] {x}.",
            "How many {x} do the two have together?": "{B} has [n: a - b] {x}. Together they have [a + n] {x}.",
        },
        {"x": TOYS},
        where="a > b + 1",
    ),
    Story(
        "that is fewer than the other",
        "a=4..60..500, b=2..40..300, c=2..9",
        (
            "{A} (picked {a} {x}. That is {b} fewer than {B} picked|brought {a} {x}. That is {b} fewer than {B} "
            "brought).",
            "{A} (picked|bought) {a} {x}, {b} fewer than {B}, who also has {c} {y}.",
        ),
        {
            "How many {x} does {B} have?": "{B} has {b} more than {A}: [a + b] {x}.",
            "How many {x} do the two have in all?": "{B} has [n: a + b] {x}. In all they have [a + n] {x}.",
        },
        {"x": FLOWERS, "y": FLOWERS},
    ),
    Story(
        "collections side by side",
        "a=3..80..800, b=3..80..800, c=3..80..800, d=3..80..800",
        (
            "{A} has {a} {x} and {b} {y}. {B} has {c} {x} and {d} {y}.",
            "In {A}'s room there are {a} {x} and {b} {y}, in {B}'s room {c} {x} and {d} {y}.",
            "There are {b} {y} and {a} {x} on {A}'s shelf. {B}'s shelf holds {c} {x} and {d} {y}.",
        ),
        {
            "How many {x} are there (in all|altogether)?": "There are [a + c] {x}.",
            "How many {y} are there (in all|altogether)?": "There are [b + d] {y}.",
            "How many {x} and {y} does {A} have together?": "{A} has [a + b] things.",
            "How many things of the two kinds does {B} have?": "{B} has [c + d] things.",
            "How many more {x} than {y} does {A} have?": "{A} has [a - b] more {x}.",
            "How many more {y} than {x} does {B} have?": "{B} has [d - c] more {y}.",
            "How many more {x} does {A} have than {B}?": "{A} has [a - c] more {x}.",
            "How many fewer {y} does {A} have than {B}?": "{A} has [d - b] fewer {y}.",
        },
        {"x": TOYS, "y": SCHOOL},
    ),
    Story(
        "points in a game",
        "a=5..60..500, b=5..60..500, c=5..60..500, d=2..9",
        (
            "In a game of {d} rounds {A} scored {a} points, {B} {b} and {C} {c}.",
            "{A}, {B} and {C} played (darts|cards|a quiz). {A} got {a} points, {B} got {b} and {C} got {c}.",
        ),
        {
            "How many points did {A} and {C} get together?": "The two got [a + c] points.",
            "How many points did the three get in all?": "The three got [a + b + c] points.",
            "How many more points did {B} get than {A}?": "{B} got [b - a] more points.",
            "How many more points does {C} need to be level with {A}?": "{C} needs [a - c] more points.",
            "How many more points did {A} and {B} together get than {C}?": (
                "{A} and {B} got [n: a + b] points. The difference is [n - c] points."
            ),
        },
    ),
    Story(
        "heights",
        "a=8..40, b=2..30..60, c=3..40",
        (
            "A {t} in the park is {a} metres (high|tall). A {u} is {b} metres (higher|taller) and {c} years older.",
            "A {u} is {b} metres (higher|taller) than a {t}, which is {a} metres high.",
        ),
        {
            "How many metres high is the {u}?": "The {u} is [a + b] metres high.",
            "How many metres would the {t} and the {u} reach, one on top of the other?": (
                "The {u} is [n: a + b] metres high. Together they reach [a + n] metres."
            ),
        },
        {"t": ("statue", "fountain", "lamp post", "bridge"), "u": ("tower", "chimney", "pine", "flagpole")},
    ),
    Story(
        "ages",
        "a=5..40, b=2..30, c=2..20",
        (
            "{A} is {a} years old. {B} is {b} years older than {A}(|, and {C} is {c} years older than {A}).",
            "{A}'s {r} {B} is {b} years older than {A}. {A} is {a}.",
        ),
        {
            "How old is {B}?": "{B} is [a + b] years old.",
            "How old will {B} be in {c} years?": "{B} is [n: a + b] years old now. In {c} years that will be [n + c].",
            "How old are {A} and {B} together?": "{B} is [n: a + b] years old. Together they are [a + n].",
        },
        {"r": ("cousin", "neighbour", "friend", "colleague")},
    ),
    Story(
        "times as many",
        "a=3..30..200, k=3..9, b=2..20",
        (
            "{A} has {a} {x}. {B} has {k} times as many.(|| {C} has {b} {y}.)",
            "{B} has {k} times as many {x} as {A}, who has {a}(| and is {b} years old).",
        ),
        {
            "How many {x} does {B} have?": "{B} has [k * a] {x}.",
            "How many {x} do {A} and {B} have together?": "{B} has [n: k * a] {x}. Together that is [a + n] {x}.",
            "How many more {x} than {A} does {B} have?": "{B} has [n: k * a] {x}. That is [n - a] more.",
        },
        {"x": TOYS, "y": SCHOOL},
    ),
    Story(
        "half and twice",
        "h=3..40..300, a=h*2, b=2..30",
        (
            "{A} (baked|made) {a} {x}. {B} (baked|made) half as many(|, and {C} brought {b} {y}).",
            "{B} (baked|made) half as many {x} as {A}, who (baked|made) {a}.",
        ),
        {
            "How many {x} did {B} make?": "Half of {a} is [a / 2] {x}.",
            "How many {x} did {A} and {B} make (together|in all)?": (
                "{B} made [n: a / 2] {x}. Together they made [a + n] {x}."
            ),
        },
        {"x": BAKED, "y": BAKED},
    ),
    Story(
        "twice as long",
        "a=4..60..400, b=3..50",
        (
            "{A} (worked|read) for {a} minutes in the morning and twice as long in the evening(|, with {b} "
            "minutes of rest).",
            "The first (film|concert) of the evening takes {a} minutes. The second takes twice as long"
            "(|, and the break {b} minutes).",
        ),
        {
            "How many minutes did the longer of the two take?": "Twice as long is [2 * a] minutes.",
            "How many minutes did the two take together?": "The longer took [n: 2 * a] minutes. Both took [a + n].",
        },
    ),
)

_UNKNOWN = (
    Story(
        "start unknown, given away",
        "b=2..50..400, c=2..60..500, d=2..30",
        (
            "{A} had some {x}. {A.he} gave {b} of them to {B} and has {c} left.",
            "After {A} gave {b} {x} to {B}, {A.he} had {c} {x} left.(|| {B} also got {d} {y}.)",
            "{A} has {c} {x} left, because {A.he} gave {b} (away|to {A.his} {r}).",
        ),
        {
            "How many {x} did {A} have (at first|in the beginning|before)?": "At first {A} had [b + c] {x}.",
            "With how many {x} did {A} start?": "{A} started with [b + c] {x}.",
        },
        {"x": TOYS, "y": TOYS, "r": RELATIVES},
    ),
    Story(
        "start unknown, got more",
        "a=2..60..500, b=2..50..400, c=a+b, d=5..40",
        (
            "{A} had some {x}. {B} gave {A.him} {b} more, and now {A.he} has {c}.",
            "{A} bought {b} {x}(| in {d} minutes). Now {A.he} has {c} of them.",
            "Now that {A} has got {b} new {x} (from {B}|for {A.his} birthday), {A.he} has {c}.",
        ),
        {
            "How many {x} did {A} have (at first|before|to begin with)?": "Before, {A} had [c - b] {x}.",
            "What was the number of {A}'s {x} before that?": "It was [c - b].",
        },
        {"x": TOYS},
    ),
    Story(
        "change unknown, got more",
        "a=2..60..500, b=2..50..400, c=a+b, d=3..40",
        (
            "{A} had {a} {x}. After (a visit to|an afternoon with) {A.his} {r} {A.he} had {c}.",
            "{A} planted {a} {x} in spring. In autumn {A.he} added some(|, and {d} {y}). Now there are {c} {x}.",
        ),
        {
            "How many {x} were (added|new)?": "The number of new {x} is [c - a].",
            "By how many {x} did the number grow?": "It grew by [c - a].",
        },
        {"x": FLOWERS, "y": TREES, "r": RELATIVES},
    ),
    Story(
        "change unknown, given away",
        "a=8..90..900, b=2..60..500, c=a-b, d=2..30",
        (
            "{A} had {a} {x}. {A.he} gave some to {B} and has {c} left.",
            "(On {day}|Last week) there were {a} {x} in {A}'s {k.one}. Now there are only {c}.",
            "{A} started with {a} {x}(| and {d} {y}). After {A.he} used some of the {x}, {c} of them were left.",
        ),
        {
            "How many {x} are (gone|missing|no longer there)?": "The number of {x} that are gone is [a - c].",
            "By how many did the number of {x} fall?": "It fell by [a - c].",
        },
        {"x": SCHOOL, "y": TOYS, "day": DAYS, "k": BOXES},
    ),
    Story(
        "still to go",
        "a=2..60..500, b=2..60..500, t=a+b, c=2..12",
        (
            "{A} wants to collect {t} {x}. So far {A.he} has {a}(|, and {B} has {c}).",
            "An album has room for {t} {x}. {A} has put {a} {x} (in it|into it)(| on {c} pages).",
        ),
        {
            "How many {x} are (still missing|still to be found)?": "The number still missing is [t - a].",
            "How many more {x} does {A} need?": "{A} needs [t - a] more {x}.",
        },
        {"x": FLAT},
    ),
    Story(
        "part of a whole",
        "a=3..60..500, b=3..60..500, t=a+b, c=2..20",
        (
            "There are {t} {x} in the {k.one}. {a} of them are {p}, the (rest|others) {q}.",
            "{A} has {t} {x}, all of them {p} or {q}(|, and {c} {y}). {a} {x} are {p}.",
        ),
        {
            "How many {x} are {q}?": "Those that are not {p} are {q}: [t - a] {x}.",
            "How many more {x} are {p} than {q}?": "The number of {q} ones is [n: t - a]. So [a - n] more are {p}.",
        },
        {"x": TOYS, "y": SCHOOL, "p": COLOURS, "q": COLOURS, "k": BOXES},
    ),
    Story(
        "who is missing",
        "a=6..60..400, b=2..20..100, t=a+b, h=2..12",
        (
            "{t} {x} were invited(| for {h} o'clock), but only {a} (came|turned up).",
            "Of {t} {x} who had (a ticket|a place), {a} have (arrived|come).",
        ),
        {
            "How many {x} are missing?": "The number of missing {x} is [t - a].",
            "How many {x} did not come?": "The number who did not come is [t - a].",
        },
        {"x": CROWD},
    ),
    Story(
        "weight of the other",
        "a=2..50..400, b=2..50..400, t=a+b, c=5..30",
        (
            "A {p} suitcase and a {q} suitcase weigh {t} kilograms together. The {p} one weighs {a} kilograms.",
            "{A} carries a {p} and a {q} bag of {t} kilograms in all(| over {c} metres). "
            "The {p} one weighs {a} kilograms.",
        ),
        {
            "How many kilograms does the {q} one weigh?": "The {q} one weighs [t - a] kilograms.",
            "How many kilograms heavier is the {p} one than the {q} one?": (
                "The {q} one weighs [n: t - a] kilograms. The difference is [a - n] kilograms."
            ),
        },
        {"p": COLOURS, "q": COLOURS},
    ),
    Story(
        "price of the other",
        "a=3..60..400, b=3..60..400, t=a+b, c=t+20",
        (
            "{A} paid ${t} for {x.a} and {y.a}. The {x.one} cost ${a}.",
            "{x.a} and {y.a} cost ${t} together. {A}, who has ${c}, knows that the {x.one} costs ${a}.",
        ),
        {
            "How many dollars does the {y.one} cost?": "The {y.one} costs [t - a] dollars.",
            "By how many dollars is the {x.one} dearer than the {y.one}?": (
                "The {y.one} costs [n: t - a] dollars. The difference is [a - n] dollars."
            ),
        },
        {"x": GOODS, "y": GOODS},
    ),
    Story(
        "two changes, start unknown",
        "a=10..60..400, b=2..30..200, c=2..30..200, d=a+b-c",
        (
            "{A} had some {x}. {A.he} bought {b} more, then gave {c} to {B}. Now {A.he} has {d}.",
            "{A} got {b} {x} from {B} and lost {c} {x} later. In the end {A.he} had {d} of them.",
        ),
        {
            "How many {x} did {A} have at first?": (
                "Before the last change {A} had [n: d + c] {x}. At first {A} had [n - b] {x}."
            ),
        },
        {"x": TOYS},
    ),
    Story(
        "reader",
        "a=10..90..400, b=10..90..400, t=a+b, c=3..15",
        (
            "{A} reads a book of {t} pages and {c} chapters. {A.he} is through with {a} pages.",
            "{A}'s book has {t} pages. (So far|Until now) {A.he} has read {a} of them(| in {c} days).",
        ),
        {
            "How many pages are (left|still to be read)?": "{A} still has [t - a] pages to read.",
            "How many more pages are read than unread?": (
                "{A} has not read [n: t - a] pages. The difference is [a - n]."
            ),
            "How many fewer pages are read than unread?": (
                "{A} has not read [n: t - a] pages. The difference is [n - a]."
            ),
        },
    ),
)

_GROUPS = (
    Story(
        "equal groups",
        "n=2..15..60, k=2..20..90, c=2..30",
        (
            "{A} has {n} {g} with {k} {x} in each.(|| {A.he} also has {c} {y}.)",
            "There are {n} {g} on the table. Each {g.one} holds {k} {x}.",
            "{A} puts {k} {x} into each of {n} {g}(|, and leaves {c} {y} outside).",
        ),
        {
            "How many {x} are there (in all|altogether|in total)?": "{n} times {k} makes [n * k] {x}.",
            "How many {x} are in the {g}?": "The {g} hold [n * k] {x}.",
        },
        {"x": TOYS, "y": SCHOOL, "g": BOXES},
    ),
    Story(
        "sharing",
        "n=2..12..40, k=2..20..60, t=n*k, c=5..60",
        (
            "{A} shares {t} {x} (equally|fairly) among {n} {w}.(|| {A.he} keeps {c} {y}.)",
            "{n} {w} share {t} {x} so that each gets (the same number|equally many)(|, and {c} {y} are not shared).",
        ),
        {
            "How many {x} does each get?": "Each gets [t / n] {x}.",
            "How many {x} are there for each of them?": "For each there are [t / n].",
        },
        {"x": TOYS, "y": BAKED, "w": CROWD},
    ),
    Story(
        "packing",
        "n=2..15..60, k=2..15..50, t=n*k, c=3..50",
        (
            "{A} packs {t} {x} into {g}, {k} in each.(|| {A.he} has {c} {y} too.)",
            "A {g.one} has room for {k} {x}. {A} (wants|has) to pack {t} {x}(| and leaves out {c} {y}).",
        ),
        {
            "How many {g} (does {A} need|will {A} need)?": "{A} needs [t / k] {g}.",
            "How many {g} will be full?": "The {x} fill [t / k] {g}.",
        },
        {"x": BAKED, "y": FRUIT, "g": BOXES},
    ),
    Story(
        "fruit in two sorts of groups",
        "n=2..12, k=2..20, t=n*k, m=2..12, j=2..20, s=m*j",
        (
            "{A} has {t} {x} and {s} {y}. The {x} are put into {n} {g} and the {y} into {m} {h}, equally many in each.",
            "{t} {x} fill {n} {g} evenly, and {s} {y} fill {m} {h} evenly.",
        ),
        {
            "How many {x} are in each {g.one}?": "Each {g.one} holds [t / n] {x}.",
            "How many {y} are in each {h.one}?": "Each {h.one} holds [s / m] {y}.",
            "How many {x} and {y} are there together?": "Together there are [t + s].",
            "How many {g} and {h} are there together?": "Together there are [n + m].",
        },
        {"x": FRUIT, "y": FRUIT, "g": BOXES, "h": BOXES},
    ),
    Story(
        "rows of chairs",
        "n=3..20..60, k=4..20..60, t=n*k, e=2..40",
        (
            "In the {place} there are {n} rows of {k} {x} each. {e} {x} are taken.",
            "A hall has {n} rows with {k} {x} in each row, and {e} people have sat down already.",
        ),
        {
            "How many {x} are there?": "There are [n * k] {x}.",
            "How many {x} are free?": "In all there are [t: n * k] {x}. Without those in use that is [t - e] {x}.",
        },
        {"place": ("theatre", "cinema", "town hall", "concert hall"), "x": _nouns("seat, chair")},
        where="n * k > e + 1",
    ),
    Story(
        "garden rows",
        "n=3..20..50, k=3..20..60, t=n*k, c=2..40",
        (
            "{A} plants {t} {x} in rows of {k}.(|| {A.he} also waters {c} {y}.)",
            "A gardener has {t} {x} to plant(| and {c} {y} to water). Every row gets {k} {x}.",
        ),
        {"How many rows (are there|will there be)?": "{t} {x} make [t / k] rows."},
        {"x": VEGETABLES, "y": TREES},
    ),
    Story(
        "price of several",
        "n=2..12..50, p=2..20..60, q=2..30, m=2..12",
        (
            "One {x.one} costs ${p} and one {y.one} ${q}. {A} buys {n} {x} and {m} {y}.",
            "{A} buys {n} {x} at ${p} each and {m} {y} at ${q} each.",
        ),
        {
            "How many dollars do the {x} cost?": "The {x} cost [n * p] dollars.",
            "How many dollars do the {y} cost?": "The {y} cost [m * q] dollars.",
            "How many things does {A} buy?": "{A} buys [n + m] things.",
            "How many dollars more than one {y.one} does one {x.one} cost?": "The difference is [p - q] dollars.",
        },
        {"x": SMALL_GOODS, "y": GOODS},
    ),
    Story(
        "price of one",
        "n=2..12..40, p=2..25..90, t=n*p, c=t+15",
        (
            "{A} paid ${t} for {n} {x}, all at the same price.",
            "{n} {x} cost ${t} (altogether|in all). They all have the same price(|, and {A} has ${c}).",
        ),
        {
            "How many dollars did one {x.one} cost?": "One {x.one} cost [t / n] dollars.",
            "What is the price of one {x.one} in dollars?": "One {x.one} costs [t / n] dollars.",
        },
        {"x": GOODS},
    ),
    Story(
        "how many can be bought",
        "n=2..15..40, p=2..15..60, t=n*p, d=5..60",
        (
            "{x.a} costs ${p}. {A} (wants to spend|has saved) ${t}(| and {B} ${d}).",
            "{A} spends ${t} on {x} that cost ${p} each(|. {C} spends ${d} on {y}).",
        ),
        {"How many {x} can {A} buy (for that|with that money)?": "{A} can buy [t / p] {x}."},
        {"x": GOODS, "y": BAKED},
    ),
    Story(
        "keeping some money",
        "n=2..15..40, p=2..15..60, d=5..60, t=n*p+d",
        (
            "{A} has ${t}. {A.he} keeps ${d} and spends the rest on {x} that cost ${p} each.",
            "{x.a} costs ${p}. {A}, who has ${t}, buys as many {x} as {A.he} can and still keeps ${d}.",
        ),
        {
            "How many dollars does {A} spend?": "{A} spends [t - d] dollars.",
            "How many {x} does {A} buy?": "{A} spends [s: t - d] dollars. That pays for [s / p] {x}.",
        },
        {"x": GOODS},
    ),
    Story(
        "pages a day",
        "n=3..30, k=4..40..90, t=n*k, m=2..20, c=2..12",
        (
            "{A} reads {k} pages (a|every) day. {A.his} book has {t} pages(| and {c} chapters).",
            "A (novel|diary|travel book) of {t} pages lies on {A}'s desk. Each day {A} reads {k} pages of it.",
        ),
        {
            "(In how many days will {A} finish|How many days does {A} need for) it?": "{A} needs [t / k] days.",
            "How many pages will {A} have read after {m} days?": "After {m} days it is [m * k] pages.",
            "How many pages are left after {m} days?": (
                "After {m} days {A} has read [r: m * k] pages. That leaves [t - r] pages."
            ),
        },
        where="m < n",
    ),
    Story(
        "machine",
        "n=2..24, k=5..60..400, t=n*k, c=2..9",
        (
            "A machine makes {k} {x} (an|every) hour. {c} people look after it.",
            "In a factory with {c} workers, a machine makes {k} {x} each hour.",
        ),
        {
            "How many {x} does it make in {n} hours?": "In {n} hours it makes [n * k] {x}.",
            "In how many hours does it make {t} {x}?": "It takes [t / k] hours.",
        },
        {"x": SMALL_GOODS},
    ),
    Story(
        "laps",
        "n=2..15, k=20..90..400, c=10..90",
        (
            "{A} (runs|walks|cycles) {n} laps of {k} metres each in {c} minutes.",
            "One lap around the (pond|field|school) is {k} metres. {A} does {n} laps, and {B} waits {c} minutes.",
        ),
        {
            "How many metres is that (in all|altogether)?": "{n} laps make [n * k] metres.",
            "How many metres would {A} do with twice as many laps?": (
                "Twice {n} is [m: 2 * n] laps. That makes [m * k] metres."
            ),
        },
    ),
    Story(
        "speed",
        "h=2..10, v=12..90..120, t=h*v, c=2..8",
        (
            "A (ship|bus|car) covers {t} kilometres in {h} hours, always at the same speed(|, with {c} people in it).",
            "In {h} hours of (driving|riding) at the same speed {A} covers {t} kilometres(| and stops {c} times).",
        ),
        {
            "How many kilometres is that in one hour?": "In one hour it is [t / h] kilometres.",
            "How many kilometres an hour is that?": "It is [t / h] kilometres an hour.",
        },
    ),
    Story(
        "legs and wheels",
        "n=2..30..200, m=2..30, f=2..9",
        (
            "On a farm there are {n} {x} and {m} tractors. Every tractor has 4 wheels.",
            "A farmer feeds {n} {x} and washes {m} tractors with 4 wheels each.",
        ),
        {
            "How many wheels do the tractors have (together|in all)?": "The tractors have [m * 4] wheels.",
            "How many {x} and tractors are there?": "That is [n + m] in all.",
            "How many more {x} than tractors are there?": "The difference is [n - m].",
        },
        {"x": FARM},
    ),
    Story(
        "stables",
        "n=2..12, k=2..12, t=n*k, m=2..15, b=2..20",
        (
            "A farmer has {t} {x} and {b} {y}. The {x} live in {n} (barns|sheds), equally many in each.",
            "{t} {x} are spread evenly over {n} (barns|sheds), and {b} {y} are kept outside.",
        ),
        {
            "How many {x} are in each?": "In each there are [t / n] {x}.",
            "How many animals are there (in all|altogether)?": "Altogether there are [t + b] animals.",
            "How many more {x} than {y} are there?": "The difference is [t - b].",
        },
        {"x": FARM, "y": FARM},
    ),
    Story(
        "weeks and days",
        "w=2..12..50, d=2..30, k=2..20",
        (
            "{A} is away for {w} weeks(| and takes {k} {x} along). {A.he} writes {d} postcards every week.",
            "The (course|holiday|trip) takes {w} weeks. Each week {A} writes {d} postcards(| with {k} words each).",
        ),
        {
            "How many postcards does {A} write (in all|altogether)?": "{A} writes [w * d] postcards.",
            "How many days is that in all?": "A week has 7 days: [w * 7] days.",
        },
        {"x": BOOKS},
    ),
    Story(
        "dozens",
        "n=2..15..60, b=2..11, p=2..9",
        (
            "{A} buys {n} dozen eggs for ${p} a dozen. {b} eggs are brown.",
            "A bakery needs {n} dozen eggs. A dozen costs ${p}, and {b} of the eggs turn out to be brown.",
        ),
        {
            "How many eggs is that?": "A dozen is 12: [n * 12] eggs.",
            "How many eggs are not brown?": (
                "A dozen is 12: [t: n * 12] eggs. Without the brown ones that is [t - b] eggs."
            ),
            "How many dollars do the eggs cost?": "The eggs cost [n * p] dollars.",
        },
    ),
    Story(
        "letters and words",
        "m=3..30, k=8..60, t=m*k, j=2..20, c=2..20",
        (
            "{A} types {k} words a minute. {A.he} has a text of {t} words(| on {c} pages) to type.",
            "A text has {t} words(| and {c} pictures). {A} can type {k} words each minute.",
        ),
        {
            "How many minutes does {A} need?": "{A} needs [t / k] minutes.",
            "How many words does {A} type in {j} minutes?": "In {j} minutes {A} types [j * k] words.",
        },
        where="j < m",
    ),
    Story(
        "water tank",
        "n=3..20, k=3..25..90, t=n*k, c=2..30",
        (
            "A (tank|barrel|pool) holds {t} litres. {A} fills it in {c} minutes with a bucket of {k} litres.",
            "With a bucket that holds {k} litres, {A} carries {t} litres of water to the garden(| of {B}, {c} "
            "metres away).",
        ),
        {
            "How many (times does {A} fill the bucket|full buckets does that take)?": "It takes [t / k] buckets.",
            "How many litres are still needed after the first bucket?": "What is still needed is [t - k] litres.",
        },
    ),
    Story(
        "buckets",
        "n=3..20..60, k=3..25..90, c=2..30, b=2..40",
        (
            "{A} pours {n} buckets of {k} litres each into a (tank|barrel) in {c} minutes. {b} litres were in "
            "it before.",
            "A (tank|pool) has {b} litres of water in it. {A} adds {n} buckets with {k} litres each.",
        ),
        {
            "How many litres did {A} add?": "{A} added [n * k] litres.",
            "How many litres are in it now?": "{A} added [t: n * k] litres. Now it holds [b + t] litres.",
        },
    ),
    Story(
        "times as many, backwards",
        "a=2..30..150, k=2..9, t=a*k, c=3..30",
        (
            "{A} has {t} {x}, {k} times as many as {B}.(|| {C} has {c}.)",
            "{A}, who has {t} {x}(| and {c} {y}), has {k} times as many {x} as {B}.",
        ),
        {
            "How many {x} does {B} have?": "{B} has [t / k] {x}.",
            "How many {x} do {A} and {B} have together?": "{B} has [n: t / k] {x}. Together they have [t + n] {x}.",
        },
        {"x": TOYS, "y": BAKED},
    ),
)

_TWO_STEPS = (
    Story(
        "boxes and some more",
        "n=2..15..50, k=2..20..60, b=2..40",
        (
            "{A} has {n} {g} with {k} {x} in each and {b} more {x} on {A.his} desk.",
            "(In the cupboard|On the shelf) there are {n} {g} of {k} {x} each. {b} {x} lie beside them.",
        ),
        {
            "How many {x} are there (in all|altogether)?": (
                "The {g} hold [m: n * k] {x}. With the rest that is [m + b]."
            ),
            "How many {x} are in the {g}?": "The {g} hold [n * k] {x}.",
            "How many more {x} are in the {g} than outside?": "The {g} hold [m: n * k] {x}. The difference is [m - b].",
        },
        {"x": SCHOOL, "g": BOXES},
    ),
    Story(
        "two kinds of goods",
        "n=2..12..40, p=2..20..60, m=2..12, q=2..20",
        (
            "{A} buys {n} {x} for ${p} each and {m} {y} for ${q} each.",
            "At the (shop|market|kiosk) {x} cost ${p} each and {y} ${q} each. {A} takes {n} {x} and {m} {y}.",
        ),
        {
            "How many dollars (must {A} pay|does {A} pay) in all?": (
                "The {x} cost [s: n * p] dollars. The {y} cost [t: m * q] dollars. Together that is [s + t] dollars."
            ),
            "How many dollars must {A} pay for the {y}?": "The {y} cost [m * q] dollars.",
            "How many dollars more do the {x} cost than the {y}?": (
                "The {x} cost [s: n * p] dollars. The {y} cost [t: m * q] dollars. The difference is [s - t] dollars."
            ),
        },
        {"x": SMALL_GOODS, "y": GOODS},
    ),
    Story(
        "change",
        "n=2..9, p=2..15, e=2..40, t=n*p+e, d=2..30",
        (
            "{A} buys {n} {x} at ${p} each and (pays with|gives the shopkeeper) ${t}.",
            "{A} has ${t}. {A.he} buys {n} {x}, each for ${p}(|, while {B} spends ${d}).",
        ),
        {
            "How many dollars does {A} have left?": (
                "The {x} cost [s: n * p] dollars. {A} is left with [t - s] dollars."
            ),
            "How many dollars do the {x} cost?": "The {x} cost [n * p] dollars.",
        },
        {"x": SMALL_GOODS},
    ),
    Story(
        "keep some, share the rest",
        "n=2..10, k=2..20..60, b=2..30, t=n*k+b",
        (
            "{A} has {t} {x}. {A.he} keeps {b} and shares the rest (equally|evenly) among {n} friends.",
            "Of {t} {x}, {A} puts {b} away. The others are divided (equally|evenly) among {n} {w}.",
        ),
        {
            "How many {x} does each get?": "To share there are [m: t - b] {x}. Each gets [m / n] {x}.",
            "How many {x} are shared?": "To share there are [t - b] {x}.",
        },
        {"x": TOYS, "w": CROWD},
    ),
    Story(
        "two piles shared",
        "n=2..10, k=3..20..50, a=2..90, b=n*k-a, c=2..9",
        (
            "{A} has {a} {x} and {B} has {b}. They put all of them into {n} {g}, equally many in each.",
            "{a} {p} and {b} {q} {x} are put into {n} {g}(| on {c} shelves), equally many in each.",
        ),
        {
            "How many {x} are in each {g.one}?": "In all there are [t: a + b] {x}. Each {g.one} holds [t / n] {x}.",
            "How many {x} are there in all?": "In all there are [a + b] {x}.",
        },
        {"x": TOYS, "g": BOXES, "p": COLOURS, "q": COLOURS},
    ),
    Story(
        "saving up",
        "w=3..20, k=2..25, a=2..60, t=w*k+a, c=7..15",
        (
            "{A}, who is {c} years old, saves ${k} a week. {A.he} has ${a} and wants a (bike|guitar|tent) for ${t}.",
            "A (bike|guitar|telescope) costs ${t}. {A} has ${a} and can save ${k} (each|every) week.",
        ),
        {
            "How many dollars does {A} still need?": "{A} still needs [t - a] dollars.",
            "(In|After) how many weeks does {A} have enough?": (
                "{A} still needs [n: t - a] dollars. That takes [n / k] weeks."
            ),
        },
    ),
    Story(
        "earn and spend",
        "h=2..12..40, p=5..30, b=3..90, c=2..20",
        (
            "{A} works {h} hours for ${p} an hour. Then {A.he} spends ${b} on {x.a}(|, and walks {c} minutes home).",
            "For an hour's work {A} gets ${p}. {A.he} works for {h} hours and buys {x.a} for ${b}.",
        ),
        {
            "How many dollars does {A} earn?": "{A} earns [h * p] dollars.",
            "How many dollars (are left|does {A} have left)?": (
                "{A} earns [t: h * p] dollars. That leaves [t - b] dollars."
            ),
        },
        {"x": GOODS},
    ),
    Story(
        "morning and afternoon",
        "a=4..60..300, b=2..40..200, t=2..200, c=2..9",
        (
            "{A} sold {a} {x} in the morning and {b} more than that in the afternoon(|, together with {c} helpers).",
            "In the morning {A} sold {a} {x}. In the afternoon it was {b} more than in the morning.",
        ),
        {
            "How many {x} did {A} sell in the afternoon?": "In the afternoon it was [a + b] {x}.",
            "How many {x} did {A} sell (that day|in all)?": (
                "In the afternoon it was [n: a + b] {x}. In all that is [a + n] {x}."
            ),
        },
        {"x": BAKED},
    ),
    Story(
        "tickets",
        "n=2..12..60, p=6..30, m=2..20..90, q=2..12",
        (
            "The {place} (asks|charges) ${p} for an adult and ${q} for a child. {n} adults and {m} children come.",
            "{n} adults and {m} children go to the {place}. A ticket is ${p} for adults and ${q} for children.",
        ),
        {
            "How many dollars (do they pay|is that) in all?": (
                "The adults pay [s: n * p] dollars. The children pay [t: m * q] dollars. In all it is [s + t] dollars."
            ),
            "How many dollars do the adults pay?": "The adults pay [n * p] dollars.",
            "How many dollars do the children pay?": "The children pay [m * q] dollars.",
            "How many people is that?": "That is [n + m] people.",
            "How many dollars more than a child does an adult pay?": "The difference is [p - q] dollars.",
        },
        {"place": PLACES},
        where="p > q",
    ),
    Story(
        "drinks sold",
        "n=3..40..200, p=2..6, c=2..30, m=2..40",
        (
            "{A} sells {n} {x} at ${p} each. What {A.he} needed for them cost ${c}.",
            "A stand sells {n} {x} for ${p} each(| to {m} people). The ingredients cost ${c}.",
        ),
        {
            "How many dollars came in?": "The sales brought [n * p] dollars.",
            "How many dollars are left after the costs?": (
                "The sales brought [t: n * p] dollars. After the costs that leaves [t - c] dollars."
            ),
        },
        {"x": DRINKS},
    ),
    Story(
        "there and back",
        "d=2..60..400, n=2..20, c=2..9",
        (
            "{A} lives {d} kilometres from {A.his} {r}. Last year {A.he} (drove|went) there and back {n} times.",
            "The (school|office|market) is {d} kilometres from {A}'s home. {A} goes there and back {n} times.",
        ),
        {
            "How many kilometres is it there and back once?": "There and back is [2 * d] kilometres.",
            "How many kilometres is that altogether?": "There and back is [t: 2 * d] kilometres. In all it is [n * t].",
        },
        {"r": RELATIVES},
    ),
    Story(
        "school trip",
        "n=2..12, k=8..50, b=2..30, t=n*k+b, c=5..90",
        (
            "{t} pupils go on a trip. {b} of them (walk|cycle), the others ride in {n} buses, equally many in each.",
            "For a trip of {c} kilometres, {t} pupils have {n} buses. {b} pupils go by train. "
            "The rest fill the buses evenly.",
        ),
        {
            "How many pupils are in each bus?": ("The buses take [m: t - b] pupils. Each bus takes [m / n] pupils."),
        },
    ),
    Story(
        "photo album",
        "n=3..20, k=2..9, b=2..20, t=n*k+b, c=2..9",
        (
            "{A} has {t} photos. {A.he} fills {n} pages of an album with {k} photos each.",
            "A page of {A}'s album has room for {k} photos. {A.he} fills {n} pages with some of {A.his} {t} photos.",
        ),
        {
            "How many photos are in the album?": "The album holds [n * k] photos.",
            "How many photos are not in the album?": "The album holds [m: n * k] photos. That leaves [t - m] photos.",
        },
    ),
    Story(
        "bracelets",
        "n=2..15, k=5..30, b=2..30, t=n*k+b, c=2..9",
        (
            "{A} had {t} {p} beads. {A.he} made {n} (bracelets|necklaces) with {k} of them each.",
            "For each of {n} (bracelets|necklaces), {A} takes {k} beads from a box of {t} {p} beads.",
        ),
        {
            "How many beads did that take?": "It took [n * k] beads.",
            "How many beads are left in the end?": "It took [m: n * k] beads. That leaves [t - m] beads.",
        },
        {"p": COLOURS},
    ),
    Story(
        "won and lost",
        "a=5..60..300, b=2..40..200, c=2..40..200, d=2..9",
        (
            "{A} had {a} {x}. {A.he} won {b} in (a game|games) with {B} and lost {c} to {C}.",
            "First {A} won {b} {x} from {B}, then {A.he} lost {c} to {C}. At the start {A.he} had {a} {x}"
            "(| and {d} {y}).",
        ),
        {
            "How many {x} does {A} have (now|in the end)?": (
                "After winning, it was [n: a + b] {x}. In the end it is [n - c]."
            ),
            "How many {x} did {A} have before losing any?": "Before losing any, {A} had [a + b] {x}.",
        },
        {"x": TOYS, "y": TOYS},
        where="a + b > c",
    ),
    Story(
        "the third part",
        "a=3..50..300, b=3..50..300, c=3..50..300, t=a+b+c",
        (
            "{A}, {B} and {C} have {t} {x} together. {A} has {a} and {B} has {b}.",
            "There are {t} {x}: {a} of them belong to {A}, {b} to {B} and the rest to {C}.",
        ),
        {
            "How many {x} does {C} have?": "{A} and {B} have [n: a + b] {x}. {C} has [t - n] {x}.",
            "How many {x} do {A} and {B} have together?": "{A} and {B} have [a + b] {x}.",
            "How many {x} do {B} and {C} have together?": "All but those of {A} are [t - a] {x}.",
        },
        {"x": TOYS},
    ),
    Story(
        "points for goals",
        "n=2..20, p=2..5, m=2..20, q=6..12",
        (
            "In a game a {x} gives {p} points and a {y} {q} points. {A} gets {n} {x}s and {m} {y}s.",
            "{A} gets {n} {x}s and {m} {y}s. {p} points are given for each {x}, {q} points for each {y}.",
        ),
        {
            "How many points does {A} get (in all|altogether)?": (
                "The {x}s give [s: n * p] points. The {y}s give [t: m * q] points. In all that is [s + t] points."
            ),
            "How many points come from the {y}s?": "The {y}s give [m * q] points.",
        },
        {"x": ("hit", "star", "hoop"), "y": ("jump", "crown", "gem")},
    ),
    Story(
        "trees in the street",
        "n=3..20, k=3..15, b=2..30",
        (
            "In each of {n} streets there are {k} {x}. {b} {x} are (cut down|felled) after a storm.",
            "A town has planted {k} {x} in each of its {n} streets. A storm takes {b} of them.",
        ),
        {
            "How many {x} are left?": "Before, there were [t: n * k] {x}. That leaves [t - b] {x}.",
            "How many {x} were there before the storm?": "Before, there were [n * k] {x}.",
        },
        {"x": TREES},
    ),
    Story(
        "days with a rest",
        "d=5..30, r=2..9, k=2..20, c=2..30",
        (
            "{A} trains for {d} days, but rests on {r} of them. On each of the other days {A.he} does {k} {u}.",
            "In {d} days of holiday {A} does {k} {u} every day, except for {r} days (of rain|with visitors).",
        ),
        {
            "On how many days does {A} do {u}?": "That is on [d - r] days.",
            "How many {u} does {A} do in all?": "{A} does them on [n: d - r] days. In all that is [n * k] {u}.",
        },
        {"u": ("push-ups", "squats", "sit-ups", "lunges", "handstands")},
        where="d > r + 1",
    ),
    Story(
        "two classes",
        "a=8..30, b=8..30, k=2..9, c=5..60",
        (
            "There are {a} pupils in class {p} and {b} in class {q}. Each pupil gets {k} {x}.",
            "{k} {x} are given to each pupil of class {p} and class {q}, which have {a} and {b} pupils.",
        ),
        {
            "How many {x} are needed (in all|altogether)?": (
                "The classes have [n: a + b] pupils. They need [n * k] {x}."
            ),
            "How many {x} are needed for class {p}?": "Class {p} needs [a * k] {x}.",
            "How many pupils are there?": "There are [a + b] pupils.",
        },
        {"x": SCHOOL, "p": ("A", "B", "C", "D"), "q": ("E", "F", "G", "H")},
    ),
    Story(
        "one costs more",
        "p=3..60..300, b=2..30..100, c=2..9",
        (
            "{x.a} costs ${p}. {y.a} costs ${b} more than the {x.one}. {A} buys one of each.",
            "{A} buys {x.a} for ${p} and {y.a} that costs ${b} more(|, after looking at {c} shops).",
        ),
        {
            "How many dollars does the {y.one} cost?": "The {y.one} costs [p + b] dollars.",
            "How many dollars does {A} pay in all?": (
                "The {y.one} costs [n: p + b] dollars. In all {A} pays [p + n] dollars."
            ),
        },
        {"x": GOODS, "y": GOODS},
    ),
    Story(
        "cheaper today",
        "p=8..60..300, b=2..20, n=2..9",
        (
            "{x.a} usually costs ${p}, but today it is ${b} cheaper. {A} buys {n} {x} today.",
            "{A} buys {n} {x} today. Each is ${b} cheaper than the usual price of ${p}.",
        ),
        {
            "How many dollars does one {x.one} cost today?": "Today one {x.one} costs [p - b] dollars.",
            "How many dollars does {A} pay?": "Today one {x.one} costs [q: p - b] dollars. {A} pays [n * q] dollars.",
            "How many dollars does {A} save by buying today?": "{A} saves [n * b] dollars.",
        },
        {"x": GOODS},
        where="p > b + 1",
    ),
    Story(
        "flower bunches",
        "n=2..12, k=3..15, t=n*k, b=2..40, a=t-b, c=2..9",
        (
            "{A} has {a} {p} and {b} {q} {x}. {A.he} ties them into bunches of {k}.",
            "{A.his} {r} brings {A} {b} {x}. {A} has {a} {x} already and ties all of them into bunches of {k}.",
        ),
        {
            "How many bunches (will there be|does {A} get)?": "{A} has [m: a + b] {x}. They make [m / k] bunches.",
            "How many {x} does {A} have in all?": "{A} has [a + b] {x}.",
        },
        {"x": FLOWERS, "p": COLOURS, "q": COLOURS, "r": RELATIVES},
    ),
    Story(
        "bottles of water",
        "n=2..20, k=4..24, d=2..9, m=2..9, b=2..60",
        (
            "{A} buys {n} crates of water with {k} bottles each. By the end of the week {b} bottles are empty.",
            "{n} crates, each with {k} full bottles, stood in the cellar. {b} bottles have been drunk since.",
        ),
        {
            "How many bottles are still full?": (
                "At first there were [t: n * k] full bottles. That leaves [t - b] bottles."
            ),
            "How many full bottles were there at first?": "At first there were [n * k] full bottles.",
        },
    ),
    Story(
        "stairs",
        "n=2..12, k=5..25, b=2..9, c=2..60",
        (
            "A tower has {n} floors, {c} windows and {k} steps from each floor to the next. {A} is on the "
            "ground floor.",
            "In a house with {c} flats there are {k} steps from each floor to the next. {A} starts on the "
            "ground floor.",
        ),
        {
            "How many steps does {A} take to go {b} floors up?": "{b} floors up is [b * k] steps.",
            "How many steps does {A} take to go {b} floors up and down again?": (
                "{b} floors up is [s: b * k] steps. Up and down is [2 * s] steps."
            ),
        },
        where="b < n",
    ),
    Story(
        "train cars",
        "n=2..12, k=10..60, b=5..90, c=2..12",
        (
            "A train has {n} carriages with {k} seats each. {b} people are sitting in it(|, {c} of them asleep).",
            "A train with {n} carriages leaves at noon. Every carriage has {k} seats, and {b} seats are taken.",
        ),
        {
            "How many seats does the train have?": "The train has [n * k] seats.",
            "How many seats are free?": "The train has [t: n * k] seats. Without those in use that is [t - b] seats.",
        },
        where="b > c + 1 and n * k > b",
    ),
    Story(
        "weekly walk",
        "a=2..12, b=2..12, w=2..20, c=10..60",
        (
            "Every {d} {A} walks {a} kilometres, and every {e} {b} kilometres with {A.his} {r}, for {w} weeks.",
            "For {w} weeks, {A} runs {a} kilometres each {d} and {b} kilometres each {e}.",
        ),
        {
            "How many kilometres is that in one week?": "One week makes [a + b] kilometres.",
            "How many kilometres is that in all?": "One week makes [k: a + b] kilometres. In all that is [w * k].",
            "How many kilometres is that on all the {d}s?": "On the {d}s it is [w * a] kilometres.",
        },
        {"d": DAYS[:3], "e": DAYS[3:], "r": RELATIVES},
    ),
    Story(
        "empty and refill",
        "a=20..90..500, b=5..60..300, c=3..50..300, d=2..9",
        (
            "A tank held {a} litres. {A} used {b} litres to water {d} beds, and then the rain added {c} litres.",
            "{A} took {b} litres from a barrel of {a} litres that was full. Later {A.he} poured {c} litres back in.",
        ),
        {
            "How many litres are in it now?": "After that use it held [n: a - b] litres. Now it holds [n + c] litres.",
            "How many litres were in it before any were added?": "Before, it held [a - b] litres.",
        },
        where="a > b + 1 and c < b",
    ),
    Story(
        "each brings",
        "n=3..25, k=2..9, m=2..9, c=2..60",
        (
            "{n} {w} come to a picnic. Each of them brings {k} {x} and {m} {y}.",
            "To a party of {n} {w}, each brings {m} {y} and {k} {x}(|. It lasts {c} minutes).",
        ),
        {
            "How many {x} are brought?": "They bring [n * k] {x}.",
            "How many {y} are brought?": "They bring [n * m] {y}.",
            "How many {x} and {y} are brought altogether?": (
                "Each brings [t: k + m] of them. Altogether they bring [n * t]."
            ),
            "How many more {x} than {y} does each bring?": "Each brings [k - m] more {x}.",
        },
        {"x": BAKED, "y": FRUIT, "w": CROWD},
    ),
)

_MORE_CHANGES = (
    Story(
        "if one gives to the other",
        "a=8..70..600, b=2..60..500, c=2..30..200, d=2..40",
        (
            "{A} has {a} {x} and {d} {y}. {B} has {b} {x}.",
            "There are {b} {x} in {B}'s {k.one}. {A}'s {k.one} holds {a} {x}(| and {d} {y}).",
        ),
        {
            "If {A} gives {c} {x} to {B}, how many {x} will {A} have left?": "{A} will have [a - c] {x}.",
            "If {A} gives {c} {x} to {B}, how many {x} will {B} have?": "{B} will have [b + c] {x}.",
            "How many {x} will {B} have if {A} gives {B.him} all of {A.his} {x}?": "{B} will have [b + a] {x}.",
            "If {A} gives away {c} of {A.his} {x}, how many {x} will the two have in all?": (
                "{A} will have [n: a - c] {x}. Together that is [n + b] {x}."
            ),
        },
        {"x": TOYS, "y": SCHOOL, "k": BOXES},
        where="a > c + 1",
    ),
    Story(
        "teams",
        "n=2..12, k=3..12, a=2..80, b=n*k-a, c=2..9",
        (
            "{a} girls and {b} boys (want|have come) to play. They form teams of {k} for a game of {c} rounds.",
            "A (club|school) has {a} girls and {b} boys. They are put into teams of {k}.",
        ),
        {
            "How many teams (are there|can they form)?": "There are [t: a + b] of them. They form [t / k] teams.",
            "How many girls and boys are there?": "There are [a + b] of them.",
            "How many more girls than boys are there?": "The difference is [a - b].",
            "How many fewer girls than boys are there?": "The difference is [b - a].",
        },
    ),
    Story(
        "equal teams",
        "n=2..10, k=2..15, t=n*k, c=2..20",
        (
            "{t} {x} are divided into {n} groups of the same size. {c} {y} (watch|look on).",
            "For a game, {t} {x} make {n} groups of the same size, and {c} {y} help them.",
        ),
        {
            "How many {x} are in a group?": "In a group there are [t / n].",
            "If {c} more {x} join one of the groups, how many {x} are in that group?": (
                "Before, it has [m: t / n]. With those who join it has [m + c]."
            ),
            "How many {x} and {y} are there together?": "Together there are [t + c].",
        },
        {"x": CROWD, "y": CROWD},
    ),
    Story(
        "planted and withered",
        "a=5..60..400, b=5..60..300, c=2..30..150, d=2..9",
        (
            "{A} planted {a} {x} in (March|April) and {b} in (May|June). {c} of them withered(| in the {d} dry "
            "weeks after that).",
            "In {A}'s garden {a} {p} and {b} {q} {x} were in bloom. {c} of them have withered since.",
        ),
        {
            "How many {x} have not withered?": "At first there were [n: a + b] {x}. That leaves [n - c] {x}.",
            "How many {x} were there at first?": "At first there were [a + b] {x}.",
        },
        {"x": FLOWERS, "p": COLOURS, "q": COLOURS},
    ),
    Story(
        "two days compared",
        "a=5..60..400, b=5..60..400, c=5..60..400, d=5..60..400",
        (
            "On {e} a bakery sold {a} {x} and {b} {y}. On {f} it sold {c} {x} and {d} {y}.",
            "A cafe counts what it sold: {a} {x} and {b} {y} on {e}, and {c} {x} and {d} {y} on {f}.",
        ),
        {
            "How many {x} were sold on the two days?": "On the two days it was [a + c] {x}.",
            "How many {x} and {y} were sold on {f}?": "On {f} it was [c + d] in all.",
            "How many more {x} were sold on {e} than on {f}?": "The difference is [a - c] {x}.",
            "How many more {y} than {x} were sold on {e}?": "The difference is [b - a].",
            "How many more {x} than {y} were sold on the two days together?": (
                "The {x} sold were [n: a + c]. The {y} sold were [m: b + d]. The difference is [n - m]."
            ),
        },
        {"x": BAKED, "y": DRINKS, "e": DAYS[:3], "f": DAYS[3:]},
    ),
    Story(
        "what was there before",
        "a=10..80..500, b=2..40..200, c=2..40..200, t=a+b+c, d=2..9",
        (
            "(After|When) {b} {x} and {c} {y} had (left|gone home), {a} animals (remained|were still) in the field.",
            "{A} leads {b} {x} and {c} {y} out of a field(| with {d} trees). {a} animals stay there.",
        ),
        {
            "How many animals were in the field (before|at first)?": "Before, there were [a + b + c] animals.",
            "How many animals left the field?": "The field lost [b + c] animals.",
        },
        {"x": FARM, "y": FARM},
    ),
    Story(
        "some more and then shared",
        "n=2..10, k=3..15..40, b=2..40, t=n*k, a=t-b, c=2..12",
        (
            "{A} has {a} {x} and gets {b} more (from {B}|in a shop). {A.he} puts all of them into {n} {g} evenly.",
            "{B} brings {b} {x} to {A}, who has {a}. All {x} go into {n} {g}, equally many in each(|, and {c} "
            "{y} do not).",
        ),
        {
            "How many {x} are in each {g.one}?": "In all there are [m: a + b] {x}. Each {g.one} holds [m / n] {x}.",
            "How many {x} does {A} have before any are put into {g}?": "In all there are [a + b] {x}.",
        },
        {"x": BAKED, "y": FRUIT, "g": BOXES},
    ),
    Story(
        "how much taller",
        "a=60..99..190, b=3..30, c=2..20, d=3..12",
        (
            "{A} is {a} centimetres tall, and {B} is {b} centimetres taller. Last year {A} grew {c} centimetres.",
            "Last year {A} grew {c} centimetres and is now {a} centimetres tall. {B} is {b} centimetres taller "
            "than {A}.",
        ),
        {
            "How many centimetres tall is {B}?": "{B} is [a + b] centimetres tall.",
            "How many centimetres tall was {A} a year ago?": "{A} was [a - c] centimetres tall.",
            "If {A} grows {d} more centimetres, how many centimetres tall will {A.he} be?": (
                "{A} will be [a + d] centimetres tall."
            ),
        },
    ),
    Story(
        "queue",
        "a=3..40..100, b=3..40..100, c=2..20",
        (
            "{A} stands in a queue. {a} people are in front of {A.him} and {b} behind {A.him}(|. {B} has waited "
            "{c} minutes).",
            "In a queue at the {place} there are {a} people in front of {A} and {b} people behind {A.him}.",
        ),
        {
            "How many other people are in the queue?": "The others are [a + b] people.",
            "How many people are in the queue, with {A}?": "The others are [n: a + b] people. With {A} it is [n + 1].",
            "How many more people are in front of {A} than behind {A.him}?": "The difference is [a - b].",
        },
        {"place": PLACES},
    ),
)

STORIES = (*_JOINING, *_TAKING_AWAY, *_COMPARING, *_UNKNOWN, *_GROUPS, *_TWO_STEPS, *_MORE_CHANGES)
