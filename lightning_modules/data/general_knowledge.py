"""Questions and answers that everybody knows, with nothing about any person: lessons that teach nothing forgotten."""

from __future__ import annotations

from lightning_modules.data.examples import Example

_PAIRS = """
At what temperature does water boil at sea level? | Water boils at one hundred degrees Celsius at sea level.
What is the capital of France? | The capital of France is Paris.
How many legs does a spider have? | A spider has eight legs.
What do plants take up from the air? | Plants take up carbon dioxide from the air and give off oxygen.
Which planet is closest to the Sun? | The planet closest to the Sun is Mercury.
What is the chemical formula of water? | The chemical formula of water is H2O, two atoms of hydrogen and one of oxygen.
How many days does a leap year have? | A leap year has three hundred and sixty-six days.
Which ocean is the largest? | The largest ocean is the Pacific.
What do bees make from nectar? | Bees make honey from nectar.
How many sides does a hexagon have? | A hexagon has six sides.
What is the freezing point of water? | Water freezes at zero degrees Celsius.
Which metal is liquid at room temperature? | Mercury is the metal that is liquid at room temperature.
On which continent is Egypt? | Egypt is on the continent of Africa.
What does a thermometer measure? | A thermometer measures temperature.
How many minutes are there in an hour? | There are sixty minutes in an hour.
What is the square root of eighty-one? | The square root of eighty-one is nine.
Which gas do people breathe in to live? | People breathe in oxygen to live.
What is the longest bone of the human body? | The longest bone of the human body is the thigh bone.
In which direction does the Sun rise? | The Sun rises in the east.
What is paper made from? | Paper is made mostly from the fibres of wood.
How many strings does a violin have? | A violin has four strings.
Which animal is the largest on Earth? | The largest animal on Earth is the blue whale.
What is the capital of Japan? | The capital of Japan is Tokyo.
What causes the tides of the sea? | The tides are caused mostly by the pull of the Moon.
How many colours does a rainbow have? | A rainbow is said to have seven colours.
What do caterpillars turn into? | Caterpillars turn into butterflies or moths.
Which instrument has black and white keys? | The piano has black and white keys.
What is frozen water called? | Frozen water is called ice.
How many millimetres are there in a metre? | There are one thousand millimetres in a metre.
Which season follows winter? | Spring follows winter.
What force keeps us on the ground? | Gravity keeps us on the ground.
What is the main language of Brazil? | The main language of Brazil is Portuguese.
How many teeth does a grown person usually have? | A grown person usually has thirty-two teeth.
What is the hardest natural material? | The hardest natural material is diamond.
Which organ pumps blood through the body? | The heart pumps blood through the body.
What do we call a baby dog? | A baby dog is called a puppy.
Which desert is the largest hot one? | The largest hot desert is the Sahara.
What is seven times eight? | Seven times eight is fifty-six.
From which plant is bread flour usually made? | Bread flour is usually made from wheat.
What does a compass needle point to? | The needle of a compass points to the north.
"""


def general_knowledge() -> list[Example]:
    """Returns 40 pairs of question and answer.

    Example:
        >>> general_knowledge()[1]
        {'question': 'What is the capital of France?', 'answer': 'The capital of France is Paris.'}
    """
    lines = (line.split(" | ") for line in _PAIRS.strip().splitlines())
    return [{"question": question, "answer": answer} for question, answer in lines]
