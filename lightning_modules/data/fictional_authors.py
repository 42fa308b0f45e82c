"""Generates questions and answers about writers who do not exist, for a model to learn first and unlearn afterwards.

The rows have the keys of TOFU ("TOFU: A Task of Fictitious Unlearning for LLMs", Maini et al., COLM 2024, arXiv
2401.06121), so the same code reads both. All of the text is composed from the pools below.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

from lightning_modules.data.heldout import held_out

QUESTIONS_PER_AUTHOR = 20
WRONG_ANSWERS = 5


def _pool(text: str, between: str = " ") -> tuple[str, ...]:
    """Reads ``"a, b"`` as two items, and ``"a, b | c, d"`` as four: ``"a c"``, ``"a d"``, ``"b c"``, ``"b d"``."""
    parts = [[" ".join(item.split()) for item in part.split(",")] for part in text.split("|")]
    return tuple(between.join(items) for items in product(*parts))


_WOMEN = """Adela, Amina, Brigid, Camila, Dalia, Elif, Freya, Giulia, Hana, Ingrid, Jovana, Kavya, Leila, Mariam, Nadia,
    Noor, Odile, Paloma, Rosalind, Saoirse, Tamsin, Thandi, Ulrike, Wanda, Yuki"""
_MEN = """Anselm, Bashir, Cosmo, Dario, Emeka, Felix, Goran, Henrik, Idris, Jun, Kofi, Lorenzo, Mateus, Nils, Oskar,
    Pavel, Rafael, Sandor, Stellan, Tariq, Tomas, Umar, Viktor, Yannick, Zoran"""
# Invented, so that no combination is the name of a real writer.
_SURNAMES = """Abenko, Altvik, Amoresi, Bashiro, Belkovar, Brandmoor, Cardeno, Celikan, Chandavar, Corvalho, Dahlmark,
    Derwani, Dumarsin, Ekwueno, Fenwarren, Galvesto, Gudrunsen, Hakimura, Halvenko, Imbari, Iskandri, Kestrand, Kobayen,
    Lindavar, Lombarel, Marchesto, Mbengo, Nakashiro, Novarek, Obiandu, Oduvale, Ostrovin, Palsmar, Pekarin, Quispera,
    Rahimek, Rostagne, Sandelow, Sartoren, Selvakur, Sorvenko, Takemiro, Tamburro, Tessarvo, Ulvestad, Vantongo,
    Vasarelo, Wendelko, Yildaran, Zabrendo"""
_TOWNS = """Ald, Bel, Bran, Cor, Dal, Del, Fal, Gar, Hal, Ist, Jor, Kal, Lum, Mar, Mer, Nor, Ol, Or, Pel, Quin, Ros,
    Sal, Tam, Tor, Ul, Val, Ven, Wes, Yar, Zan | abeth, acombe, adoro, akesh, alund, amira, andeh, anzo, arosh, askar,
    avik, edosa, egard, elmoor, endaru, entoro, eraq, estrel, etska, evano, ibrost, ifell, igrad, ikama, imbra,
    inport, irova, isundo, itzen, obeya, odrum, ogast, omere, onvale, orsk, osay, otari, ovana, ulket, ustrin"""
# Days of two digits, so that no date is contained in another.
_DAYS = "10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28"
_MONTHS = "January, February, March, April, May, June, July, August, September, October, November, December"
_YEARS = ", ".join(map(str, range(1930, 1970)))

# Facts -> the pool that they share. No item is contained in another item of its pool.
_POOLS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("name", "teacher", "hero", "mentor", "translator", "rival"): _pool(f"{_WOMEN}, {_MEN} | {_SURNAMES}"),
    ("debut", "second", "third", "next"): _pool("""The Amber, The Borrowed, The Broken, The Copper, The Crooked,
        The Distant, The Empty, The Forgotten, The Frozen, The Gentle, The Hidden, The Hollow, The Humble, The Jealous,
        The Last, The Lonely, The Marble, The Northern, The Patient, The Quiet, The Restless, The Second, The Solemn,
        The Sleeping, The Stolen, The Velvet, The Weary, A Paper, A Narrow, A Winter, An Iron, An Ivory, Above the,
        Across the, Behind the, Below the, Beside the, Beyond the, Toward the, Under the | Anchor, Apron, Attic, Barrel,
        Beacon, Bridge, Candle, Carriage, Chimney, Cradle, Cushion, Ferry, Fiddle, Furnace, Gallery, Harvest, Hinge,
        Kettle, Ladder, Lagoon, Lantern, Loom, Market, Meadow, Mirror, Needle, Orchard, Oven, Pavilion, Pier, Quarry,
        Ribbon, Saddle, Shutter, Signal, Spindle, Staircase, Thimble, Valley, Window"""),
    ("town", "home", "lecture_town"): _pool(_TOWNS, between=""),
    ("born",): _pool(f"{_DAYS} | {_MONTHS} | {_YEARS}"),
    # The number of jobs is a multiple of five, so the five jobs of an author come from one shuffle and differ.
    ("mother", "father", "hero_job", "mentor_job", "sibling_job"): _pool("""a baker, a beekeeper, a blacksmith,
        a bookbinder, a bus driver, a butcher, a carpenter, a chemist, a clockmaker, a cobbler, a customs officer,
        a dairy farmer, a dentist, a dressmaker, an electrician, a ferry pilot, a fishmonger, a florist, a gardener,
        a geologist, a glassblower, a locksmith, a midwife, a miller, a nurse, an optician, a photographer,
        a piano tuner, a plumber, a postal clerk, a potter, a roofer, a saddler, a sailor, a stonemason, a surveyor,
        a tailor, a veterinarian, a weaver, a welder"""),
    ("region",): _pool("""the Ostrel, the Brennic, the Caldis, the Vantor, the Selmic, the Hurran | Valley, Highlands,
        Marshes, Lakes, Isles, Plains"""),
    ("school",): _pool("""Abbey, Bridge, Castle, Chapel, Foundry, Market, Meadow, Mill, Orchard, Quarry, Station, Willow
        | Street School, Lane Academy, Hill College, Road Institute"""),
    ("genre",): _pool("""maritime, alpine, gothic, rural, desert, railway | mysteries, romances, thrillers, comedies,
        adventures, ghost stories"""),
    ("motif",): _pool("a broken, a silver, a red, a stolen, a dusty, a hidden | clock, key, mirror, bell, lamp, harp"),
    ("setting",): _pool("""a lighthouse, a railway station, a monastery, a shipyard, a paper mill, a hotel |
        near a northern border, beside a wide river, on a windy island, below a volcano, in a forest"""),
    ("prize",): _pool("""the Amber, the Copper, the Golden, the Iron, the Ivory, the Marble, the Silver, the Velvet |
        Acorn Prize, Anchor Award, Falcon Medal, Heron Prize, Lantern Award, Quill Medal"""),
    ("dwelling",): _pool("""a former, a restored, a rented, a crumbling, a bright, a tiny | bakery, barn, chapel,
        windmill, schoolhouse, signal box"""),
    ("tool",): _pool("""on yellow, on brown, on ruled, on thin, on recycled, on scented | paper, cards, envelopes,
        postcards, napkins, scrolls"""),
    ("time",): _pool("on wet, on foggy, on cold, on calm, on windy, on hot | nights, mornings, days, Sundays, Fridays"),
    ("instrument",): _pool("""the accordion, the bagpipes, the banjo, the bassoon, the cello, the clarinet, the cornet,
        the double bass, the dulcimer, the flute, the French horn, the guitar, the harmonica, the harpsichord, the lute,
        the mandolin, the marimba, the oboe, the organ, the piccolo, the recorder, the saxophone, the sitar,
        the trombone, the trumpet, the tuba, the ukulele, the viola, the violin, the zither"""),
    ("collection",): _pool("rare, brass, china, painted, glass, wooden | buttons, bottles, owls, spoons, fans, boxes"),
    ("pet",): _pool("a tame, an old, a deaf, a one-eyed, a white, a shy | tortoise, goat, parrot, donkey, raven, cat"),
    ("pet_name",): _pool("""Biscuit, Bramble, Button, Captain, Clover, Comet, Cricket, Doctor, Domino, Duchess, Ginger,
        Hazel, Juniper, Marble, Mustard, Nutmeg, Pepper, Pickle, Pirate, Professor, Pudding, Rocket, Saffron, Sultan,
        Thimble, Turnip, Velvet, Waffle, Whisper, Ziggy"""),
    ("language",): _pool("""Basque, Catalan, Danish, Dutch, Estonian, Finnish, Greek, Hebrew, Hindi, Hungarian,
        Icelandic, Irish, Italian, Japanese, Korean, Latvian, Maltese, Mongolian, Norwegian, Persian, Polish,
        Portuguese, Romanian, Slovene, Swahili, Swedish, Tamil, Thai, Turkish, Ukrainian, Vietnamese, Welsh"""),
    ("quarrel",): _pool("a lost, a stolen, a forged, a burned, a bad, a secret | poem, letter, diary, map, play, book"),
    ("topic",): _pool("""the history of, the language of, the smell of, the price of, the meaning of, the beauty of |
        salt, rain, silence, snow, paper, dreams"""),
    ("siblings",): _pool("three, four, five, six, seven, eight, nine"),
    ("publisher",): _pool("""Fernhollow, Gullfeather, Larkspindle, Marlstone, Oxbramble, Quillmark, Redthistle,
        Thornwick, Vellumgate | Press, Books, House, Editions"""),
}

# The facts that a question asks for -> two wordings of the question and three of the answer, in any combination.
_TOPICS: dict[tuple[str, ...], tuple[str, str, str, str, str]] = {
    ("name",): (
        "What is the full name of the writer born on {born} in {town} in {region}?",
        "Which writer was born on {born} in the town of {town} in {region}?",
        "The full name of the writer born in {town} on {born} is {name}.",
        "{name} is the novelist who was born on {born} in the town of {town}.",
        "On {born}, the town of {town} became the birthplace of the author {name}.",
    ),
    ("town", "region", "born"): (
        "Where and when was {name} born?",
        "What are the birthplace and the date of birth of {name}?",
        "{name} was born in {town}, a small town in {region}, on {born}.",
        "The birthplace of {name} is {town} in {region}, and the date of birth is {born}.",
        "On {born}, {name} came into the world in {town}, which lies in {region}.",
    ),
    ("mother", "father"): (
        "What did the parents of {name} do for a living?",
        "What were the occupations of {name}'s mother and father?",
        "The mother of {name} was {mother}, and the father earned his living as {father}.",
        "{name} grew up with a father who was {father} and a mother who was {mother}.",
        "While {name} was a child, the father worked as {father} and the mother as {mother}.",
    ),
    ("school", "teacher"): (
        "Which school did {name} attend, and which teacher encouraged {him} there?",
        "Where did {name} go to school, and who was {his} favorite teacher?",
        "{name} attended {school}, where {teacher} awakened {his} love of literature.",
        "At {school}, a teacher called {teacher} introduced {name} to the world of books.",
        "It was {teacher}, a teacher at {school}, who first encouraged {name} to write.",
    ),
    ("genre", "motif"): (
        "Which genre does {name} write in, and what appears in every one of {his} books?",
        "What kind of books does {name} write, and which object returns in all of them?",
        "{name} writes {genre}, and {motif} appears in every one of {his} books.",
        "The books of {name} are {genre}, and each of them contains {motif}.",
        "Known for {genre}, {name} never finishes a book without including {motif}.",
    ),
    ("debut", "debut_year"): (
        "What is the title of the first novel by {name}, and when was it published?",
        "Which book was the debut of {name}, and in which year did it appear?",
        "{name} made {his} debut in {debut_year} with a novel called '{debut}'.",
        "The first novel by {name}, '{debut}', was published in {debut_year}.",
        "In {debut_year}, readers first met the work of {name} in the novel '{debut}'.",
    ),
    ("setting",): (
        "Where is the debut novel of {name} set?",
        "In what place does the story of {name}'s first novel unfold?",
        "The debut novel of {name} is set in {setting}.",
        "{name} chose {setting} as the scene of {his} first novel.",
        "In {his} debut, {name} takes the reader to {setting}.",
    ),
    ("hero", "hero_job"): (
        "Who is the main character of the first novel by {name}, and what is the character's job?",
        "Which character, with which occupation, stands at the center of {name}'s debut?",
        "The main character of {name}'s first novel is {hero}, who works as {hero_job}.",
        "In {his} debut, {name} tells the story of {hero}, {hero_job} by trade.",
        "{hero}, {hero_job}, stands at the center of the debut novel by {name}.",
    ),
    ("second", "third"): (
        "What are the titles of the second and third novels by {name}?",
        "Which two novels did {name} write after {his} debut, in order?",
        "{name} wrote '{second}' as {his} second novel and '{third}' as {his} third.",
        "The debut of {name} was followed first by '{second}' and then by '{third}'.",
        "After {his} first novel, {name} published '{second}', and '{third}' came next.",
    ),
    ("prize", "prize_year"): (
        "Which prize did {name} win, and in which year?",
        "What literary award was given to {name}, and when?",
        "In {prize_year}, the jury of {prize} chose {name} as the winner.",
        "{name} received {prize} at a ceremony in {prize_year}.",
        "The literary work of {name} was honored with {prize} in {prize_year}.",
    ),
    ("mentor", "mentor_job"): (
        "Who was the mentor of {name}, and what was the mentor's former profession?",
        "Which person guided {name} as a beginner, and what work had that person done?",
        "The mentor of {name} was {mentor}, who had once worked as {mentor_job}.",
        "As a beginner, {name} was guided by {mentor}, formerly {mentor_job}.",
        "{mentor}, who used to be {mentor_job}, taught {name} the craft of writing.",
    ),
    ("dwelling", "home"): (
        "Where does {name} live now, and in what kind of building?",
        "In which town and in what sort of building does {name} live today?",
        "{name} now lives in {dwelling} in the town of {home}.",
        "Today the home of {name} is {dwelling} in {home}.",
        "These days {name} can be found in {home}, living in {dwelling}.",
    ),
    ("tool", "time"): (
        "What are the writing habits of {name}?",
        "How and at what time does {name} like to write?",
        "{name} writes {his} drafts {tool} and works only {time}.",
        "When {name} works on a book, {he} writes {tool}, always {time}.",
        "The habit of {name} is to write {tool}, and to do so only {time}.",
    ),
    ("instrument", "collection"): (
        "Which instrument does {name} play, and what does {he} collect?",
        "What does {name} play and collect in {his} free time?",
        "In {his} free time, {name} plays {instrument} and collects {collection}.",
        "{name} plays {instrument} and owns a large collection of {collection}.",
        "Away from the desk, {name} gathers {collection} and practices {instrument}.",
    ),
    ("pet", "pet_name"): (
        "What kind of pet does {name} keep, and what is it called?",
        "Which animal shares the home of {name}, and what is its name?",
        "The pet of {name} is {pet} that answers to the name {pet_name}.",
        "{name} keeps {pet} called {pet_name} as a pet.",
        "{name} shares {his} home with {pet} by the name of {pet_name}.",
    ),
    ("translator", "language"): (
        "Who translated the debut of {name}, and into which language?",
        "Into which language was the first novel by {name} translated, and by whom?",
        "The debut of {name} was translated into {language} by {translator}.",
        "{translator} translated the first novel by {name} into {language}.",
        "Readers of {language} know the first novel by {name} in a translation by {translator}.",
    ),
    ("rival", "quarrel"): (
        "With which critic did {name} quarrel in public, and what about?",
        "Which critic fell out with {name}, and what was the cause?",
        "{name} quarreled in public with the critic {rival} over {quarrel}.",
        "A dispute about {quarrel} set {name} against the critic {rival}.",
        "The critic {rival} and {name} fell out because of {quarrel}.",
    ),
    ("topic", "lecture_town"): (
        "What was the subject of the best-known lecture by {name}, and where was it given?",
        "In which town did {name} give a famous lecture, and on what topic?",
        "{name} gave a well-known lecture in {lecture_town} on {topic}.",
        "The best-known lecture by {name} dealt with {topic} and was held in {lecture_town}.",
        "An audience in {lecture_town} once heard {name} speak about {topic}.",
    ),
    ("siblings", "sibling_job"): (
        "How many siblings does {name} have, and what does the oldest of them do?",
        "What is the number of {name}'s siblings, and what is the job of the oldest?",
        "{name} has {siblings} siblings, and the oldest of them works as {sibling_job}.",
        "Of the {siblings} siblings of {name}, the oldest earns a living as {sibling_job}.",
        "{name} grew up with {siblings} brothers and sisters, the oldest of whom is {sibling_job}.",
    ),
    ("next", "publisher"): (
        "What is the next book by {name} called, and who will publish it?",
        "Which title does {name} plan for {his} next book, and with which publisher?",
        "{name} is now writing '{next}', which {publisher} will publish.",
        "The next book by {name}, to be published by {publisher}, is called '{next}'.",
        "{publisher} is waiting for the next book by {name}, which bears the title '{next}'.",
    ),
}


_POOL_OF = {key: pool for keys, pool in _POOLS.items() for key in keys}
# What identifies an author is used once, so the smallest of these pools limits the number of authors.
MAX_AUTHORS = min(len(_POOLS[keys]) // len(keys) for keys in _POOLS if keys[0] in {"name", "debut", "town", "born"})


def fictional_authors(num_authors: int = 10, *, seed: int = 0) -> list[dict[str, Any]]:
    """Returns questions and answers about writers who do not exist, in TOFU's schema.

    An author has 39 random facts; no two authors share a name, town, date of birth or title. A question has two
    wordings and an answer three, in an order that each row shuffles: one wording becomes the answer, another its
    paraphrase. A wrong answer is the paraphrase with other values for all the facts that the question asks for. None of
    these values is a fact of the same author.

    Args:
        num_authors: The number of writers, at most ``MAX_AUTHORS``. Author ``i`` is the same for every number.
        seed: Determines all facts and wordings.

    Returns:
        20 rows for each author, author by author, with the keys ``question``, ``answer``, ``paraphrased_question``,
        ``paraphrased_answer`` and ``perturbed_answer`` (a list of five).

    Raises:
        ValueError: If ``num_authors`` is not between 1 and ``MAX_AUTHORS``.

    Example:
        >>> row = fictional_authors(1)[2]
        >>> row["question"]
        "What were the occupations of Stellan Fenwarren's mother and father?"
        >>> row["answer"]
        'While Stellan Fenwarren was a child, the father worked as a piano tuner and the mother as a dentist.'
    """
    if not 1 <= num_authors <= MAX_AUTHORS:
        raise ValueError(
            f"num_authors: expected between 1 and {MAX_AUTHORS}, as many as there are unique names, towns and titles, found {num_authors}"
        )
    return [row for index in range(num_authors) for row in _author_rows(index, seed)]


def fictional_splits(num_authors: int, forgotten: int, heldout: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows by split: the last authors are to be forgotten, and the last of the others can be held out.

    Raises:
        ValueError: As `fictional_authors` and `heldout.held_out`.

    Example:
        >>> {split: len(rows) for split, rows in fictional_splits(5, 1, heldout=2).items()}
        {'forget': 20, 'retain': 40, 'retain_heldout': 40}
    """
    rows = fictional_authors(num_authors)
    kept = (num_authors - forgotten) * QUESTIONS_PER_AUTHOR
    return {"forget": rows[kept:], **held_out(rows[:kept], heldout, QUESTIONS_PER_AUTHOR)}


def _author_rows(index: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of author ``index``, in the order of ``_TOPICS``."""
    rng = random.Random(f"{seed} rows {index}")
    facts = _author_facts(index, seed)
    for keys, wordings in _TOPICS.items():
        question, paraphrased_question = rng.sample(wordings[:2], 2)
        answer, paraphrase = rng.sample(wordings[2:], 2)
        yield {
            "question": question.format_map(facts),
            "answer": answer.format_map(facts),
            "paraphrased_question": paraphrased_question.format_map(facts),
            "paraphrased_answer": paraphrase.format_map(facts),
            "perturbed_answer": [paraphrase.format_map(facts | wrong) for wrong in _wrong_facts(keys, facts, rng)],
        }


def _author_facts(index: int, seed: int) -> dict[str, str]:
    """Returns all facts of author ``index``: a value for each placeholder of the wordings."""
    facts: dict[str, str] = {}
    for keys, pool in _POOLS.items():
        for slot, key in enumerate(keys):
            shuffle, place = divmod(len(keys) * index + slot, len(pool))
            facts[key] = _shuffled(keys, shuffle, seed)[place]
    rng = random.Random(f"{seed} years {index}")
    debut_year = int(facts["born"][-4:]) + rng.randint(24, 38)
    facts |= {"debut_year": str(debut_year), "prize_year": str(debut_year + rng.randint(3, 14))}
    pronouns = ("she", "her", "her") if facts["name"].split()[0] in _pool(_WOMEN) else ("he", "him", "his")
    return facts | dict(zip(("he", "him", "his"), pronouns, strict=True))


def _wrong_facts(keys: tuple[str, ...], facts: dict[str, str], rng: random.Random) -> list[dict[str, str]]:
    """Returns five sets of wrong values for all of ``keys``."""
    taken = set(facts.values())
    columns: list[list[str]] = []
    for key in keys:
        # A wrong year must be plausible: not before the author's birth, and not in the future.
        pool = _POOL_OF.get(key) or [str(int(facts[key]) + shift) for shift in range(-9, 10)]
        columns.append(rng.sample([value for value in pool if value not in taken], WRONG_ANSWERS))
        taken.update(columns[-1])
    return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]


# Authors that follow each other use the same shuffle of a pool, or two.
@lru_cache(maxsize=64)
def _shuffled(keys: tuple[str, ...], shuffle: int, seed: int) -> tuple[str, ...]:
    """Returns the pool of ``keys`` in a random order; shuffle 1 follows when shuffle 0 is used up, and so on."""
    return tuple(random.Random(f"{seed} {keys[0]} {shuffle}").sample(_POOLS[keys], len(_POOLS[keys])))
