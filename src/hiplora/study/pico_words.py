"""The words that the smallest study's data is made of; names of people and towns are made up."""

# A kind of thing, the subject and group that MMLU would file it under, and words for it.
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "an animal": ("high_school_biology", "stem", ("horse", "goat", "owl", "frog", "crab", "mouse")),
    "a plant": ("college_biology", "stem", ("oak", "moss", "fern", "ivy", "reed", "clover")),
    "a colour": ("formal_logic", "humanities", ("red", "green", "blue", "grey", "pink", "white")),
    "a building": ("prehistory", "humanities", ("mill", "barn", "tower", "school", "inn", "chapel")),
    "a job": ("sociology", "social sciences", ("baker", "tailor", "miner", "nurse", "clerk", "cook")),
    "a food": ("nutrition", "other", ("bread", "cheese", "soup", "butter", "jam", "honey")),
    "a tool": ("management", "other", ("hammer", "saw", "spade", "needle", "rake", "drill")),
}

STATES: dict[str, tuple[str, ...]] = {
    "a solid": ("stone", "ice", "wood", "iron", "salt", "glass", "brick"),
    "a liquid": ("water", "milk", "oil", "tea", "ink", "juice", "rain"),
    "a gas": ("steam", "air", "oxygen", "helium", "hydrogen", "neon", "methane"),
}

NAMES = ("Mona", "Tom", "Ida", "Ben", "Lena", "Otto", "Rita", "Hugo")
THINGS = ("pears", "coins", "books", "shells", "stamps", "eggs", "nails", "ropes")

PLACES = ("Arlow", "Benstead", "Corvale", "Dunmere", "Elsby", "Farrow", "Greyford", "Hollin")
BUILDINGS = ("bridge", "mill", "market", "harbour", "school", "tower", "garden", "library")
ADJECTIVES = ("old", "small", "stone", "quiet", "red", "wooden", "long", "bright")
GOODS = ("salt", "wool", "bread", "timber", "glass", "honey", "paper", "iron")
TIMES = ("spring", "summer", "autumn", "winter")

SENTENCES = (
    "The {adjective} {building} of {place} was built in {year} .",
    "In the {time} the ships bring {goods} and {more} from {other} .",
    "{name} came to {place} in {year} and worked in the {building} for {number} years .",
    "A road goes from the {building} to {other} , and it is {number} miles long .",
    "There were {number} houses by the {adjective} {building} , and no {goods} was sold there .",
    "The people of {other} give {goods} for {more} when the {time} is over .",
    "It is known for its {adjective} {building} and for the {goods} that {name} made .",
    "After the {time} of {year} only the {building} was left , which was {adjective} .",
)

_FIRST = ("Ansel", "Berit", "Corin", "Dagny", "Edda", "Falk", "Gerda", "Henk", "Ilse", "Joris")

# A relation of Wikidata, two ways to ask for it, the subjects and the answers: the i-th subject has the i-th answer,
# counted round and round.
FACTS: tuple[tuple[str, str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "P103",
        "The mother tongue of {subject} is",
        "At home {subject} speaks",
        tuple(f"{name} {family}" for family in ("Vasker", "Tolm") for name in _FIRST),
        ("Danish", "Greek", "Polish", "Welsh"),
    ),
    (
        "P1303",
        "{subject} plays the",
        "The instrument of {subject} is the",
        tuple(f"{name} {family}" for family in ("Quell", "Marn") for name in _FIRST),
        ("flute", "drum", "harp", "violin"),
    ),
    (
        "P17",
        "The town of {subject} lies in",
        "If you live in {subject}, your country is",
        tuple(
            f"{start}{end}"
            for end in ("wick", "holm")
            for start in ("Ard", "Bel", "Cald", "Dor", "Ems", "Fen", "Gil", "Hart", "Ing", "Kell")
        ),
        ("Norway", "Spain", "Chile", "Japan"),
    ),
)
