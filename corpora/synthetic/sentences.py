"""Sentences to say to a house, a robot or a ticket office, from a small grammar.

Every choice turns up equally often where it fits, so that a corpus of a thousand sentences teaches
all of the vocabulary. Homophones are avoided: no spelling has to be guessed from the context.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

SLOTS: Mapping[str, Sequence[str]] = {
    "switch": ["on", "off"],
    "room": [
        "kitchen",
        "bathroom",
        "bedroom",
        "hall",
        "garage",
        "office",
        "garden",
        "cellar",
        "nursery",
        "library",
    ],
    "device": [
        "lamp",
        "radio",
        "heater",
        "fan",
        "camera",
        "television",
        "alarm",
        "oven",
        "printer",
        "speaker",
    ],
    "opening": ["door", "window", "curtains", "gate", "shutters"],
    "operate": ["open", "close", "lock", "check"],
    "fetch": ["bring", "carry", "push", "take", "deliver"],
    "colour": [
        "red",
        "green",
        "yellow",
        "blue",
        "black",
        "white",
        "orange",
        "purple",
        "silver",
        "brown",
    ],
    "object": [
        "box",
        "bottle",
        "basket",
        "cup",
        "hammer",
        "blanket",
        "ladder",
        "bucket",
        "notebook",
        "ball",
        "jacket",
        "umbrella",
    ],
    "where": ["under", "behind", "beside", "above", "near"],
    "furniture": ["table", "shelf", "sofa", "cupboard", "desk", "fireplace", "mirror", "piano"],
    "direction": ["forward", "backwards", "left", "right", "upstairs", "outside"],
    "unit": ["steps", "metres", "seconds", "minutes"],
    "robot": ["robot", "computer", "captain", "machine"],
    "number": [
        "three",
        "five",
        "six",
        "seven",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fifteen",
        "nineteen",
        "twenty",
        "thirty",
        "forty",
        "fifty",
        "sixty",
        "seventy",
        "ninety",
    ],
    "digit": ["zero", "three", "five", "six", "seven", "nine"],
    "hour": ["three", "five", "six", "seven", "nine", "ten", "eleven", "twelve"],
    "clock": ["fifteen", "twenty", "thirty", "forty", "fifty"],
    "ordinal": ["first", "second", "third", "fourth", "fifth", "last", "next"],
    "city": [
        "london",
        "paris",
        "madrid",
        "oslo",
        "berlin",
        "dublin",
        "vienna",
        "lisbon",
        "boston",
        "toronto",
        "sydney",
        "cairo",
    ],
    "day": [
        "monday",
        "tuesday",
        "wednesday",
        "thursday",
        "friday",
        "saturday",
        "sunday",
    ],
    "part": ["morning", "afternoon", "evening"],
    "month": [
        "january",
        "february",
        "april",
        "june",
        "august",
        "september",
        "october",
        "december",
    ],
    "weather": ["rain", "snow", "fog", "thunder", "sunshine", "frost"],
    "feel": ["cold", "windy", "warm", "cloudy", "humid", "stormy", "pleasant", "gentle"],
    "vehicle": ["train", "bus", "ferry", "flight", "taxi"],
    "leave": ["leaves", "arrives", "returns", "departs"],
    "food": [
        "apples",
        "carrots",
        "onions",
        "lemons",
        "potatoes",
        "tomatoes",
        "mushrooms",
        "eggs",
        "bananas",
    ],
    "powder": ["sugar", "pepper", "butter", "honey", "vinegar", "cream"],
    "cook": ["mix", "boil", "fry", "bake", "wash", "chop"],
    "person": [
        "anna",
        "peter",
        "maria",
        "oliver",
        "sophie",
        "david",
        "julia",
        "martin",
        "emma",
        "thomas",
    ],
    "contact": ["call", "leave a message with", "send the report to", "remind"],
    "chore": [
        "water the plants",
        "feed the animals",
        "clean the carpet",
        "charge the battery",
        "empty the bin",
        "paint the fence",
        "repair the bicycle",
        "answer the letter",
    ],
    "music": ["violin", "guitar", "trumpet", "jazz", "opera", "folk"],
    "volume": ["louder", "softer", "slower", "faster"],
}

TEMPLATES: Sequence[str] = (
    "turn {switch} the {device} in the {room}",
    "{operate} the {room} {opening} before {hour} {clock}",
    "is the {colour} {device} in the {room} still {switch}",
    "set the {room} {device} at {number} degrees",
    "please {operate} the {opening} and turn {switch} the {device}",
    "{robot} {fetch} the {colour} {object} from the {room}",
    "put the {colour} {object} {where} the {furniture}",
    "move {direction} {number} {unit} and then turn {direction}",
    "{robot} stop {where} the {furniture} and wait {number} {unit}",
    "pick up the {object} {where} the {colour} {furniture}",
    "find my {colour} {object} it was {where} the {furniture}",
    "will there be {weather} in {city} on {day}",
    "expect {weather} and a {feel} {part} in {city}",
    "the {part} in {city} was {feel} and {feel}",
    "the {ordinal} {vehicle} from {city} {leave} at {hour} {clock}",
    "book {number} seats on the {vehicle} from {city}",
    "the {vehicle} from {city} {leave} on {day} {part}",
    "how long is the {vehicle} between {city} and {city}",
    "{number} plus {number} and {number} minus {digit}",
    "the code is {digit} {digit} {digit} {digit} {digit}",
    "count from {digit} up and stop at {number}",
    "{contact} {person} on {day} {part}",
    "my meeting with {person} is on the {ordinal} of {month}",
    "{chore} on {day} and {chore} in {month}",
    "ask {person} if we can {chore} this {part}",
    "set an alarm at {hour} {clock} on {day}",
    "add {number} {food} and some {powder} on the list",
    "{cook} the {food} with {powder} and {powder}",
    "{cook} {number} {food} until {hour} {clock}",
    "play some {music} {volume} in the {room}",
    "{person} plays {music} every {part} on {day}",
    "a little {volume} please {robot} it is {hour} {clock}",
)


class SentenceMaker:
    """An endless supply of sentences, none of them twice.

    Args:
        seed: the same seed gives the same sentences.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._decks: dict[str, list[str]] = {}
        self._said: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            words = []
            for word in self._draw("", TEMPLATES).split():
                slot = word.strip("{}")
                words.append(self._draw(slot, SLOTS[slot]) if word != slot else word)
            sentence = " ".join(words)
            if sentence not in self._said:
                self._said.add(sentence)
                return sentence

    def _draw(self, name: str, choices: Sequence[str]) -> str:
        """Deal from a shuffled deck, so that all choices are used before any is used again."""
        deck = self._decks.get(name)
        if not deck:
            deck = self._decks[name] = list(choices)
            self._random.shuffle(deck)
        return deck.pop()
