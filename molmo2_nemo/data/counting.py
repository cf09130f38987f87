"""Whether a question asks for a number of things that could be pointed at one by one.

Molmo2 answers those with points and their number. Data sets in which people answer them in words are asked with a
sentence that wants no points, so that the two do not contradict each other (allenai/molmo2:
olmo/preprocessing/detect_counting_question.py, which serves PixMo-AskModelAnything, PixMo-CapQA and
Molmo2-MultiImageQA). Amounts that cannot be pointed at are no such things: miles, dollars, years, ways, "how many
more". Requests without a question ("Give me the number of dogs") count here and not there; estimates ("Roughly how
many"), times and percents the other way round.
"""

import re

_UNITS = r"""
    (milli|nano|micro)?seconds? | minutes? | hours? | days? | weeks? | months? | years? | decades? | centuries
    | (kilo|centi|milli|micro|nano|deci)?met(er|re)s? | (square\ |cubic\ |sq\ )?(feet|ft|inch(es)?|miles?|yards?)
    | nautical\ miles? | leagues? | fathoms? | acres? | hectares?
    | dollars? | cents? | euros? | pounds? | rupees? | yen | bucks | (percent|per\ cent|percentage\ points)
    | mph | kph | knots? | cubic | gallons? | quarts? | pints? | fluid\ ounces? | ounces? | (milli|centi)?lit(er|re)s?
    | (kilo|milli|micro)?grams? | kgs? | lbs? | tons? | tonnes? | degrees? | calories | carbs | hertz | horsepower
    | (kilo|mega|giga|tera)?(bytes|bits|watts|pixels) | volts | amps | psi | atmospheres | likes | views
"""
_NO_THINGS = (
    rf"""(?! (?:\ the)? \s* (?: {_UNITS} | (different\ )?ways | times | more | fewer | less | much | points )\b)"""
)
_ROUGHLY = r"(?<! approximately\ ) (?<! about\ ) (?<! roughly\ ) (?<! around\ ) (?<! estimate\ )"
_NOT = r"(?<! do\ not\ ) (?<! don't\ ) (?<! don’t\ ) (?<! without\ ) (?<! never\ ) (?<! not\ to\ )"
_COUNTS = re.compile(
    rf"""
    # How many of them are there?
    \b {_ROUGHLY} how\ ?many \b {_NO_THINGS}
    # Count the cats.
    | {_NOT} \b (count|tally) (\ up)?\ (of\ )?(all|every|each|the|how) \b {_NO_THINGS}
    # What is the number of cats? Give me the total count of cats.
    | \b (what | what's | what’s | what\ (is|are|was|were) | give | give\ me | tell\ me | state | find | indicate )
      \ the (\ exact|\ precise|\ total|\ overall)? \ (number|count|amount|num|total)
      \ of \b (?! \ the\ | \ money | \ this\ | \ that\ ) {_NO_THINGS}
    | \b total\ (number|count)\ of \b (?! \ money ) {_NO_THINGS}
    # There are ___ cats.
    | \b (there\ (are|is) | a\ total\ of | i\ (can\ )?see | shows? | contains? ) \ _{{2,}}
    """,
    re.IGNORECASE | re.VERBOSE,
)


def asks_for_a_count(question: str) -> bool:
    """Decided by the words alone; tests/unit/test_counting.py has a table of what is and what is not."""
    return bool(_COUNTS.search(question))
