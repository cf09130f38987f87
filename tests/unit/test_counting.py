"""Questions that ask for a number of things to point at, and questions that only sound like it."""

import pytest

from molmo2_nemo.data.counting import asks_for_a_count

COUNTS = """
How many cats are there?
how many people are in the picture
Howmany apples do you see?
So, how many of the chairs are red?
In the left image, how many windows does the house have?
How many different kinds of flowers are on the table?
Look closely. How many fingers is she holding up?
How many wheels does this truck have, and what is it carrying?
HOW MANY BIRDS?
Can you tell me how many books are on the top shelf?
Count the sheep.
Please count all of the candles on the cake.
Count every person who wears a hat.
Tally each vote on the board.
count up the coins for me
Could you count how many buttons the shirt has?
What is the number of cars on the road?
What's the total number of players on the field?
What is the exact count of eggs in the basket?
Give me the number of dogs in this photo.
Tell me the total count of windows.
The total number of boats is what I want to know.
There are ___ cats in the picture.
I can see ____ people standing by the door.
Fill in the blank: there is ___ tree behind the house.
The plate holds a total of ___ cookies.
""".strip().splitlines()

OTHERS = """
How many miles is it to the next town?
How many dollars does the shirt cost?
How many years old does the man look?
How many square feet does this flat have?
How many calories are in this meal?
How many degrees is it outside, going by the thermometer?
How many minutes are left on the timer?
How many percent of the bar is filled?
How many more goals does the home team need?
How many ways are there to solve this puzzle?
How many times has this record been broken?
How many megabytes is the file?
What is the license number?
What is the number of the bus?
What is the number of this house?
What is the phone number on the sign?
What is the amount of money on the bill?
What is the license plate number of the white car?
Approximately how many people are in the stadium?
Roughly how many trees are there?
About how many seats does the hall have?
Do not count the people, describe the mood instead.
Describe it, but don't count the leaves.
Without counting, say whether there are many people.
Is there a number of reasons why the road is closed?
Which country is this?
Can you count on this bridge to hold?
Who won the vote count?
Where is the counter?
My ___ is broken, what does the picture say about it?
""".strip().splitlines()


@pytest.mark.parametrize("question", COUNTS)
def test_asks_for_a_count(question):
    assert asks_for_a_count(question)


@pytest.mark.parametrize("question", OTHERS)
def test_asks_for_something_else(question):
    assert not asks_for_a_count(question)
