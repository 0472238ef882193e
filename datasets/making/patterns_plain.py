"""Question patterns over one table: look-ups, filters, counts, aggregates and orderings.

A pattern is (kind, SQL, training wordings, test wordings). A name in braces is a slot that
slots.py fills; the same name in question and SQL gets the same value. The wordings of the
two lists never mix: the first makes training and preference rows, the second the test.
"""

LOOKUP = [
    ("lookup", "SELECT capital FROM countries WHERE name = '{country}'", [
        "What is the capital of {country}?", "Which city is the capital of {country}?",
        "Name the capital city of {country}.", "Tell me the capital of {country}.",
        "{country}: what is its capital?", "Capital of {country}?",
    ], ["Which town serves as the seat of government in {country}, i.e. its capital?",
        "I forgot the capital of {country}, what is it?"]),
    ("lookup", "SELECT population FROM countries WHERE name = '{country}'", [
        "How many people live in {country}?", "What is the population of {country}?",
        "Give the number of inhabitants of {country}.", "How large is the population of {country}?",
        "Tell me how many inhabitants {country} has.", "Population of {country}?",
    ], ["How populous is {country}?", "What's the headcount of {country}, in people?"]),
    ("lookup", "SELECT area FROM countries WHERE name = '{country}'", [
        "What is the area of {country}?", "How large is {country} in square kilometres?",
        "Give the area of {country}.", "How many square kilometres does {country} cover?",
        "What is the surface area of {country}?", "Area of {country} in km2?",
    ], ["How big is the territory of {country} in square kilometres?",
        "State the land size of {country}."]),
    ("lookup", "SELECT currency FROM countries WHERE name = '{country}'", [
        "What is the currency of {country}?", "Which currency is used in {country}?",
        "What money do people use in {country}?", "Name the currency of {country}.",
        "With which currency does one pay in {country}?", "Currency of {country}?",
    ], ["What do shoppers in {country} pay with?", "If I travel to {country}, which currency do I need?"]),
    ("lookup", "SELECT continent FROM countries WHERE name = '{country}'", [
        "On which continent is {country}?", "Which continent does {country} belong to?",
        "What continent is {country} in?", "Name the continent of {country}.",
        "In which part of the world, by continent, is {country}?",
    ], ["{country} lies on what continent?"]),
    ("lookup", "SELECT name FROM countries WHERE capital = '{capital}'", [
        "Which country has {capital} as its capital?", "{capital} is the capital of which country?",
        "Of what country is {capital} the capital?", "Name the country whose capital is {capital}.",
        "What country is governed from its capital {capital}?", "Whose capital is {capital}?",
    ], ["{capital} is the capital city of what nation?", "What nation has its capital at {capital}?"]),
    ("lookup", "SELECT country FROM cities WHERE name = '{city}'", [
        "In which country is {city}?", "Which country is the city of {city} in?",
        "Where is the city {city}? Give the country.", "Name the country where {city} is.",
        "What country does {city} belong to?", "The city of {city} is in which country?",
    ], ["{city} is a city in what nation?", "What nation would I visit to see {city}?"]),
    ("lookup", "SELECT population FROM cities WHERE name = '{city}'", [
        "How many people live in the city of {city}?", "What is the population of the city {city}?",
        "Give the number of inhabitants of the city {city}.", "How large is the city population of {city}?",
        "How many inhabitants does the city of {city} have?",
    ], ["How populous is the city of {city}?", "What is the head count for the city {city}?"]),
    ("lookup", "SELECT river FROM cities WHERE name = '{city}'", [
        "On which river is {city}?", "Which river runs through {city}?",
        "What river is the city of {city} on?", "Name the river that {city} lies on.",
        "Which river flows past {city}?", "{city} stands on which river?",
    ], ["On the banks of which river was {city} built?", "What is the river of {city} called?"]),
    ("lookup", "SELECT length FROM rivers WHERE name = '{river}'", [
        "How long is the {river}?", "What is the length of the {river}?",
        "How many kilometres long is the {river}?", "Give the length of the river {river}.",
        "Tell me how long the {river} is in kilometres.", "Length of the {river}?",
    ], ["Over how many kilometres does the {river} stretch?", "State the {river}'s length."]),
    ("lookup", "SELECT mouth FROM rivers WHERE name = '{river}'", [
        "Where does the {river} end?", "Into what does the {river} flow?",
        "What is the mouth of the {river}?", "Which water does the {river} flow into?",
        "Name the sea or river that the {river} empties into.", "Where is the mouth of the {river}?",
    ], ["Which body of water receives the {river}?", "Where does the water of the {river} finally go?"]),
    ("lookup", "SELECT height FROM mountains WHERE name = '{mountain}'", [
        "How high is {mountain}?", "What is the height of {mountain}?",
        "How many metres high is {mountain}?", "Give the height of {mountain} in metres.",
        "Tell me how tall {mountain} is.", "Height of {mountain}?",
    ], ["What elevation does {mountain} reach?", "How many metres does {mountain} rise?"]),
    ("lookup", "SELECT country FROM mountains WHERE name = '{mountain}'", [
        "In which country is the mountain {mountain}?", "Which country is {mountain} a mountain of?",
        "Where is the mountain {mountain}? Name the country.", "What country does the peak {mountain} stand in?",
        "Name the country of the mountain {mountain}.",
    ], ["Climbers of {mountain} travel to which country?"]),
    ("lookup", "SELECT range FROM mountains WHERE name = '{rangemountain}'", [
        "Which mountain range is {rangemountain} in?", "What range does {rangemountain} belong to?",
        "{rangemountain} is part of which range?", "Name the range of the mountain {rangemountain}.",
        "To which mountain range does {rangemountain} belong?",
    ], ["{rangemountain} is a summit of what mountain range?"]),
    ("lookup", "SELECT depth FROM lakes WHERE name = '{lake}'", [
        "How deep is {lake}?", "What is the depth of {lake}?", "Give the depth of {lake} in metres.",
        "How many metres deep is {lake}?", "Tell me the depth of {lake}.",
    ], ["How far down is the bottom of {lake}, in metres?"]),
    ("lookup", "SELECT area FROM lakes WHERE name = '{lake}'", [
        "How large is {lake}?", "What is the area of {lake}?", "How many square kilometres does {lake} cover?",
        "Give the surface area of {lake}.", "Tell me the area of {lake} in km2.",
    ], ["What is the size of {lake} in square kilometres?"]),
]

LISTS = [
    ("filter", "SELECT neighbor FROM borders WHERE country = '{country}'", [
        "Which countries border {country}?", "List the neighbors of {country}.",
        "What are the neighboring countries of {country}?", "Name all countries that share a border with {country}.",
        "Which neighbors does {country} have?", "Show every country next to {country}.",
    ], ["Which nations are adjacent to {country}?", "{country} touches which countries by land?"]),
    ("filter", "SELECT language FROM languages WHERE country = '{country}'", [
        "Which languages are spoken in {country}?", "What languages does {country} have?",
        "List the languages of {country}.", "What do people speak in {country}?",
        "Name the languages of {country}.", "Show the languages spoken in {country}.",
    ], ["In what languages do officials of {country} work?", "Which tongues are in use in {country}?"]),
    ("filter", "SELECT country FROM languages WHERE language = '{language}'", [
        "In which countries is {language} spoken?", "Which countries speak {language}?",
        "List all countries where {language} is a language.", "Where do people speak {language}?",
        "Name the countries that have {language} as a language.", "Show every country that uses {language}.",
    ], ["Where would speaking {language} get me understood officially?", "Which nations count {language} among their languages?"]),
    ("filter", "SELECT name FROM cities WHERE country = '{country}'", [
        "Which cities are in {country}?", "List the cities of {country}.", "Name all cities in {country}.",
        "What cities does {country} have?", "Show the cities of {country}.",
    ], ["Enumerate the urban centres (cities) of {country}."]),
    ("filter", "SELECT name FROM countries WHERE currency = '{currency}'", [
        "Which countries use the {currency}?", "List the countries whose currency is the {currency}.",
        "Where is the {currency} the currency?", "Name all countries that pay with the {currency}.",
        "What countries have the {currency}?",
    ], ["In which states is the {currency} legal tender?", "Whose money is the {currency}?"]),
    ("filter", "SELECT country FROM flows WHERE river = '{river}'", [
        "Through which countries does the {river} flow?", "Which countries does the {river} run through?",
        "List the countries along the {river}.", "What countries does the river {river} pass?",
        "Name every country on the {river}.", "Show the countries the {river} crosses.",
    ], ["A boat trip down the whole {river} would visit which countries?", "Which nations lie along the course of the {river}?"]),
    ("filter", "SELECT river FROM flows WHERE country = '{country}'", [
        "Which rivers flow through {country}?", "List the rivers of {country}.", "What rivers run through {country}?",
        "Name all rivers in {country}.", "Show every river that flows in {country}.",
    ], ["What waterways (rivers) cross {country}?"]),
    ("filter", "SELECT lake FROM shores WHERE country = '{country}'", [
        "Which lakes are in {country}?", "List the lakes of {country}.", "What lakes does {country} have?",
        "Name all lakes with a shore in {country}.", "Show the lakes in {country}.",
    ], ["Which lakes could I swim in while staying in {country}?"]),
    ("filter", "SELECT country FROM shores WHERE lake = '{lake}'", [
        "Which countries lie on {lake}?", "What countries share {lake}?", "List the countries around {lake}.",
        "Name the countries on the shore of {lake}.", "In which countries is {lake}?",
    ], ["{lake} touches the territory of which countries?"]),
    ("filter", "SELECT name FROM mountains WHERE range = '{range}'", [
        "Which mountains are in the {range}?", "List the mountains of the {range}.",
        "Name all mountains that belong to the {range}.", "What mountains does the {range} have?",
        "Show every mountain in the {range}.",
    ], ["What summits make up the {range}?", "Which peaks stand in the {range}?"]),
    ("filter", "SELECT name FROM mountains WHERE country = '{country}'", [
        "Which mountains are in {country}?", "List the mountains of {country}.", "What mountains does {country} have?",
        "Name all mountains in {country}.", "Show the mountains of {country}.",
    ], ["What peaks can be climbed in {country}?"]),
    ("filter", "SELECT name FROM rivers WHERE mouth = '{sea}'", [
        "Which rivers flow into the {sea}?", "List all rivers that end in the {sea}.",
        "What rivers empty into the {sea}?", "Name the rivers whose mouth is the {sea}.",
        "Which rivers have their mouth at the {sea}?",
    ], ["What rivers discharge into the {sea}?", "The {sea} takes in the water of which rivers?"]),
    ("filter", "SELECT name FROM cities WHERE river = '{river}'", [
        "Which cities are on the {river}?", "List the cities on the river {river}.", "What cities lie on the {river}?",
        "Name all cities that the {river} flows through.", "Show the cities along the {river}.",
    ], ["What towns were built on the {river}?"]),
    ("filter", "SELECT name FROM countries WHERE population > {people}", [
        "Which countries have more than {people} people?", "List countries with over {people} inhabitants.",
        "Name the countries whose population is above {people}.", "What countries have a population greater than {people}?",
        "Show all countries with more than {people} inhabitants.",
    ], ["Which nations are home to upwards of {people} people?", "Countries exceeding {people} inhabitants?"]),
    ("filter", "SELECT name FROM countries WHERE continent = '{continent}' AND population < {people}", [
        "Which countries in {continent} have fewer than {people} people?",
        "List the countries of {continent} with less than {people} inhabitants.",
        "Name countries in {continent} whose population is below {people}.",
        "What countries in {continent} have a population under {people}?",
    ], ["Which nations of {continent} don't reach {people} people?"]),
    ("filter", "SELECT name FROM countries WHERE continent = '{continent}' AND area > {area}", [
        "Which countries in {continent} are larger than {area} square kilometres?",
        "List the countries of {continent} with an area above {area}.",
        "Name all countries in {continent} that cover more than {area} km2.",
        "What countries in {continent} have an area greater than {area}?",
    ], ["Which nations of {continent} are bigger than {area} square kilometres?"]),
    ("filter", "SELECT name FROM mountains WHERE height > {height}", [
        "Which mountains are higher than {height} metres?", "List all mountains above {height} m.",
        "Name the mountains that are taller than {height} metres.", "What mountains have a height of more than {height} m?",
    ], ["Which peaks rise beyond {height} metres?"]),
    ("filter", "SELECT name FROM rivers WHERE length > {length}", [
        "Which rivers are longer than {length} kilometres?", "List all rivers with a length over {length} km.",
        "Name the rivers that are more than {length} km long.", "What rivers have a length above {length} kilometres?",
    ], ["Which rivers stretch beyond {length} km?"]),
    ("filter", "SELECT name FROM lakes WHERE depth > {depth}", [
        "Which lakes are deeper than {depth} metres?", "List the lakes with a depth of more than {depth} m.",
        "Name all lakes that are over {depth} metres deep.", "What lakes have a depth above {depth} m?",
    ], ["Which lakes go down further than {depth} metres?"]),
    ("filter", "SELECT name FROM cities WHERE country = '{country}' AND population > {people}", [
        "Which cities in {country} have more than {people} people?",
        "List the cities of {country} with over {people} inhabitants.",
        "Name cities in {country} whose population is above {people}.",
        "What cities in {country} have a population greater than {people}?",
    ], ["Which cities of {country} are home to upwards of {people} people?"]),
]
