"""Question patterns that group, join or nest. The form is patterns_plain.py's."""

GROUPS = [
    (
        "group",
        "SELECT country FROM borders GROUP BY country HAVING COUNT(*) > {k}",
        [
            "Which countries have more than {k} neighbors?",
            "List the countries that border more than {k} countries.",
            "Name countries with over {k} neighbors.",
            "What countries have more than {k} borders?",
        ],
        ["Which nations are adjacent to upwards of {k} others?"],
    ),
    (
        "group",
        "SELECT country FROM languages GROUP BY country HAVING COUNT(*) > {k3}",
        [
            "Which countries have more than {k3} languages?",
            "List the countries where more than {k3} languages are spoken.",
            "Name countries with over {k3} languages.",
            "In what countries do people speak more than {k3} languages?",
        ],
        ["Which nations count upwards of {k3} languages?"],
    ),
    (
        "group",
        "SELECT language FROM languages GROUP BY language ORDER BY COUNT(*) DESC LIMIT {n2}",
        [
            "What are the {n2} languages spoken in the most countries?",
            "List the top {n2} languages by number of countries.",
            "Name the {n2} most common languages.",
            "Which {n2} languages do most countries speak?",
        ],
        ["Rank the leading {n2} tongues by how many nations use them."],
    ),
    (
        "group",
        "SELECT country FROM {table} GROUP BY country ORDER BY COUNT(*) DESC LIMIT 1",
        [
            "Which country has the most {table}?",
            "What country has the largest number of {table}?",
            "Name the country with the most {table}.",
            "In which country are there the most {table}?",
        ],
        [],
    ),
    (
        "group",
        "SELECT country FROM {table} GROUP BY country HAVING COUNT(*) > {k}",
        [
            "Which countries have more than {k} {table}?",
            "List the countries with over {k} {table}.",
            "Name countries that have more than {k} {table}.",
            "In what countries are there more than {k} {table}?",
        ],
        ["Which nations count upwards of {k} {table}?"],
    ),
    (
        "group",
        "SELECT continent, {agg}(population) FROM countries GROUP BY continent",
        [
            "What is the {aggword} population for each continent?",
            "Give the {aggword} country population per continent.",
            "For every continent, show the {aggword} population of its countries.",
            "List each continent with its {aggword} population.",
        ],
        [],
    ),
    (
        "group",
        "SELECT continent, {agg}(area) FROM countries GROUP BY continent",
        [
            "What is the {aggword} area for each continent?",
            "Give the {aggword} country area per continent.",
            "For every continent, show the {aggword} area of its countries.",
            "List each continent with its {aggword} area.",
        ],
        [],
    ),
    (
        "group",
        "SELECT continent, COUNT(*) FROM countries WHERE population > {people} GROUP BY continent",
        [
            "How many countries with more than {people} people does each continent have?",
            "Count the countries with over {people} inhabitants per continent.",
            "For every continent, count the countries with a population above {people}.",
        ],
        ["Continent by continent, how many nations are home to upwards of {people} people?"],
    ),
    (
        "group",
        "SELECT range, {agg}(height) FROM mountains WHERE country = '{country}' AND range IS NOT NULL GROUP BY range",
        [
            "What is the {aggword} mountain height for each range in {country}?",
            "Give the {aggword} height per range in {country}.",
            "For every range in {country}, show the {aggword} mountain height.",
        ],
        ["Range by range, what is the {aggword} elevation in {country}?"],
    ),
    (
        "group",
        "SELECT river, COUNT(*) FROM cities WHERE country = '{country}' AND river IS NOT NULL GROUP BY river",
        [
            "How many cities are on each river in {country}?",
            "Count the cities in {country} per river.",
            "For every river, count the cities of {country} on it.",
        ],
        ["River by river, how many cities of {country} are there?"],
    ),
    (
        "group",
        "SELECT currency FROM countries WHERE continent = '{continent}' GROUP BY currency HAVING COUNT(*) > 1",
        [
            "Which currencies are used by more than one country in {continent}?",
            "List currencies shared by several countries of {continent}.",
            "Name the currencies that more than 1 country in {continent} has.",
        ],
        ["In {continent}, what money do at least two nations have in common?"],
    ),
    (
        "group",
        "SELECT mouth, COUNT(*) FROM rivers WHERE length > {length} GROUP BY mouth",
        [
            "For each mouth, how many rivers longer than {length} km are there?",
            "Count the rivers over {length} km per mouth.",
            "How many rivers longer than {length} km end at each mouth?",
        ],
        ["Mouth by mouth, how many rivers stretch beyond {length} km?"],
    ),
]

BORDER_JOIN = "FROM borders JOIN countries ON countries.name = borders.neighbor WHERE borders.country = '{country}'"
LANGUAGE_JOIN = "FROM languages JOIN countries ON countries.name = languages.country WHERE "
CITY_JOIN = "FROM cities JOIN countries ON countries.name = cities.country WHERE "
FLOW_JOIN = "FROM flows JOIN rivers ON rivers.name = flows.river WHERE flows.country = '{country}'"
SHORE_JOIN = "FROM shores JOIN lakes ON lakes.name = shores.lake WHERE shores.country = '{country}'"
PEAK_JOIN = "FROM mountains JOIN countries ON countries.name = mountains.country WHERE "

JOINS = [
    (
        "join",
        f"SELECT countries.capital {BORDER_JOIN}",
        [
            "What are the capitals of the neighbors of {country}?",
            "List the capitals of countries that border {country}.",
            "Name the capital of each neighbor of {country}.",
            "Show the capitals of all countries next to {country}.",
            "Which capitals do the neighbors of {country} have?",
        ],
        ["Which capital cities do the nations adjacent to {country} have?"],
    ),
    (
        "join",
        f"SELECT SUM(countries.population) {BORDER_JOIN}",
        [
            "What is the total population of the neighbors of {country}?",
            "How many people live in the countries that border {country}?",
            "Add up the population of all neighbors of {country}.",
            "Give the total population of countries next to {country}.",
        ],
        ["Altogether, how many people call the nations adjacent to {country} home?"],
    ),
    (
        "join",
        f"SELECT countries.name {BORDER_JOIN} ORDER BY countries.{{up}} DESC LIMIT 1",
        [
            "Which neighbor of {country} has the largest {up}?",
            "Name the neighbor of {country} with the greatest {up}.",
            "What is the country with the highest {up} that borders {country}?",
            "Of the neighbors of {country}, which has the biggest {up}?",
        ],
        ["Which nation adjacent to {country} is number one by {up}?"],
    ),
    (
        "join",
        f"SELECT countries.name {BORDER_JOIN} AND countries.population > {{people}}",
        [
            "Which neighbors of {country} have more than {people} people?",
            "List the neighbors of {country} with over {people} inhabitants.",
            "Name the countries that border {country} and have a population above {people}.",
        ],
        ["Which nations adjacent to {country} are home to upwards of {people} people?"],
    ),
    (
        "join",
        f"SELECT countries.name {LANGUAGE_JOIN}languages.language = '{{language}}' AND countries.continent = '{{continent}}'",
        [
            "Which countries in {continent} speak {language}?",
            "List the countries of {continent} where {language} is spoken.",
            "Name the {language} speaking countries in {continent}.",
            "In what countries of {continent} do people speak {language}?",
        ],
        ["Which nations of {continent} count {language} among their languages?"],
    ),
    (
        "join",
        f"SELECT SUM(countries.population) {LANGUAGE_JOIN}languages.language = '{{language}}'",
        [
            "What is the total population of the countries that speak {language}?",
            "How many people live in countries where {language} is spoken?",
            "Add up the population of all {language} speaking countries.",
        ],
        ["Altogether, how many people live in the nations that count {language} among their languages?"],
    ),
    (
        "join",
        f"SELECT countries.capital {LANGUAGE_JOIN}languages.language = '{{language}}'",
        [
            "What are the capitals of the countries that speak {language}?",
            "List the capitals of countries where {language} is spoken.",
            "Name the capitals of all {language} speaking countries.",
        ],
        ["Which capital cities do the nations with {language} as a language have?"],
    ),
    (
        "join",
        f"SELECT DISTINCT languages.language {LANGUAGE_JOIN}countries.continent = '{{continent}}' AND countries.population > {{people}}",
        [
            "Which languages are spoken in countries of {continent} with more than {people} people?",
            "List the languages of countries in {continent} with over {people} inhabitants.",
            "Name the languages spoken in {continent} in countries whose population is above {people}.",
        ],
        ["Which tongues are in use in nations of {continent} with upwards of {people} people?"],
    ),
    (
        "join",
        f"SELECT cities.name {CITY_JOIN}countries.continent = '{{continent}}' AND cities.population > {{people}}",
        [
            "Which cities in {continent} have more than {people} people?",
            "List the cities of {continent} with over {people} inhabitants.",
            "Name the cities in {continent} whose population is above {people}.",
            "What cities of {continent} have a population greater than {people}?",
        ],
        ["Which cities of {continent} are home to upwards of {people} people?"],
    ),
    (
        "join",
        f"SELECT cities.name {CITY_JOIN}countries.continent = '{{continent}}' ORDER BY cities.population DESC LIMIT {{n}}",
        [
            "What are the {n} largest cities in {continent}?",
            "List the top {n} cities of {continent} by population.",
            "Name the {n} most populous cities in {continent}.",
            "Show the {n} biggest cities of {continent}.",
        ],
        ["Rank the leading {n} cities of {continent} by inhabitants."],
    ),
    (
        "join",
        f"SELECT countries.currency {CITY_JOIN}cities.name = '{{city}}'",
        [
            "Which currency is used in the city of {city}?",
            "What is the currency in {city}?",
            "With what currency do people pay in {city}?",
            "Name the currency of the country where {city} is.",
        ],
        ["What do shoppers in the city of {city} pay with?"],
    ),
    (
        "join",
        f"SELECT countries.continent {CITY_JOIN}cities.name = '{{city}}'",
        [
            "On which continent is the city of {city}?",
            "What continent is {city} in?",
            "Name the continent where the city {city} is.",
        ],
        ["The city {city} lies on what continent?"],
    ),
    (
        "join",
        f"SELECT rivers.name {FLOW_JOIN} ORDER BY rivers.length DESC LIMIT 1",
        [
            "What is the longest river in {country}?",
            "Which river that flows through {country} is the longest?",
            "Name the longest river of {country}.",
            "Of the rivers in {country}, which is the longest?",
        ],
        ["Which waterway of {country} stretches the most kilometres?"],
    ),
    (
        "join",
        f"SELECT rivers.name {FLOW_JOIN} AND rivers.length > {{length}}",
        [
            "Which rivers in {country} are longer than {length} kilometres?",
            "List the rivers of {country} with a length over {length} km.",
            "Name the rivers that flow through {country} and are longer than {length} km.",
        ],
        ["Which waterways of {country} stretch beyond {length} km?"],
    ),
    (
        "join",
        f"SELECT rivers.name, rivers.length {FLOW_JOIN}",
        [
            "List the rivers of {country} with their lengths.",
            "Which rivers flow through {country}, and how long are they?",
            "Show name and length of every river in {country}.",
        ],
        ["What waterways cross {country}, and what is the length of each?"],
    ),
    (
        "join",
        f"SELECT lakes.name {SHORE_JOIN} ORDER BY lakes.{{lakeby}} DESC LIMIT 1",
        [
            "Which lake in {country} has the greatest {lakeby}?",
            "Name the lake of {country} with the largest {lakeby}.",
            "Of the lakes in {country}, which has the most {lakeby}?",
            "What is the lake with the greatest {lakeby} in {country}?",
        ],
        ["Which of {country}'s lakes is number one by {lakeby}?"],
    ),
    (
        "join",
        f"SELECT mountains.name {PEAK_JOIN}countries.continent = '{{continent}}' ORDER BY mountains.height DESC LIMIT {{n}}",
        [
            "What are the {n} highest mountains in {continent}?",
            "List the top {n} mountains of {continent} by height.",
            "Name the {n} tallest mountains in {continent}.",
            "Show the {n} highest peaks of {continent}.",
        ],
        ["Rank the leading {n} peaks of {continent} by elevation."],
    ),
    (
        "join",
        f"SELECT mountains.name {PEAK_JOIN}countries.continent = '{{continent}}' AND mountains.height > {{height}}",
        [
            "Which mountains in {continent} are higher than {height} metres?",
            "List the mountains of {continent} above {height} m.",
            "Name the mountains in {continent} that are taller than {height} metres.",
        ],
        ["Which peaks of {continent} rise beyond {height} metres?"],
    ),
    (
        "join",
        f"SELECT countries.continent, COUNT(*) {LANGUAGE_JOIN}languages.language = '{{language}}' GROUP BY countries.continent",
        [
            "How many countries of each continent speak {language}?",
            "Count the {language} speaking countries per continent.",
            "For every continent, count the countries where {language} is spoken.",
        ],
        ["Continent by continent, how many nations count {language} among their languages?"],
    ),
]

NESTED = [
    (
        "nested",
        "SELECT name FROM countries WHERE population > (SELECT population FROM countries WHERE name = '{country}')",
        [
            "Which countries have more people than {country}?",
            "List the countries with a larger population than {country}.",
            "Name all countries whose population is greater than that of {country}.",
            "What countries are more populous than {country}?",
        ],
        ["Which nations exceed {country} in headcount?"],
    ),
    (
        "nested",
        "SELECT name FROM countries WHERE continent = '{continent}' AND area > (SELECT area FROM countries WHERE name = '{country}')",
        [
            "Which countries in {continent} are larger than {country}?",
            "List the countries of {continent} with a greater area than {country}.",
            "Name all countries in {continent} whose area is above that of {country}.",
        ],
        ["Which nations of {continent} exceed {country} in territory?"],
    ),
    (
        "nested",
        "SELECT COUNT(*) FROM countries WHERE area < (SELECT area FROM countries WHERE name = '{country}')",
        [
            "How many countries are smaller than {country}?",
            "Count the countries with a smaller area than {country}.",
            "What is the number of countries whose area is below that of {country}?",
        ],
        ["How many nations are outsized by {country} in area?"],
    ),
    (
        "nested",
        "SELECT name FROM rivers WHERE length > (SELECT length FROM rivers WHERE name = '{river}')",
        [
            "Which rivers are longer than the {river}?",
            "List the rivers with a greater length than the {river}.",
            "Name all rivers that are longer than the river {river}.",
        ],
        ["Which rivers outstretch the {river}?"],
    ),
    (
        "nested",
        "SELECT name FROM mountains WHERE height > (SELECT height FROM mountains WHERE name = '{mountain}')",
        [
            "Which mountains are higher than {mountain}?",
            "List the mountains with a greater height than {mountain}.",
            "Name all mountains that are taller than {mountain}.",
        ],
        ["Which peaks tower above {mountain}?"],
    ),
    (
        "nested",
        "SELECT name FROM lakes WHERE depth > (SELECT depth FROM lakes WHERE name = '{lake}')",
        [
            "Which lakes are deeper than {lake}?",
            "List the lakes with a greater depth than {lake}.",
            "Name all lakes deeper than {lake}.",
        ],
        ["Which lakes go down further than {lake}?"],
    ),
    (
        "nested",
        "SELECT name FROM countries WHERE continent = '{continent}' AND {up} > (SELECT AVG({up}) FROM countries)",
        [
            "Which countries in {continent} have a {up} above the world average?",
            "List the countries of {continent} whose {up} is greater than average.",
            "Name the countries in {continent} with more than the average {up} of all countries.",
        ],
        ["Which nations of {continent} exceed the global mean {up}?"],
    ),
    (
        "nested",
        "SELECT name FROM mountains WHERE range = '{range}' AND height > (SELECT AVG(height) FROM mountains WHERE range = '{range}')",
        [
            "Which mountains of the {range} are higher than the average of that range?",
            "List mountains in the {range} above the average height of the {range}.",
            "Name the mountains of the {range} that are taller than its average.",
        ],
        ["Which peaks of the {range} exceed the mean elevation of the {range}?"],
    ),
    (
        "nested",
        "SELECT name FROM countries WHERE continent = '{continent}' AND name NOT IN (SELECT country FROM borders)",
        [
            "Which countries in {continent} have no neighbors?",
            "List the countries of {continent} without any border.",
            "Name the countries in {continent} that border no other country.",
            "What countries of {continent} have no neighboring country?",
        ],
        ["Which nations of {continent} are adjacent to nobody?"],
    ),
    (
        "nested",
        "SELECT name FROM countries WHERE continent = '{continent}' AND name NOT IN (SELECT country FROM {table})",
        [
            "Which countries in {continent} have no {table}?",
            "List the countries of {continent} without {table}.",
            "Name the countries in {continent} for which there are no {table}.",
        ],
        ["Which nations of {continent} lack {table}?"],
    ),
    (
        "nested",
        "SELECT language FROM languages WHERE country IN (SELECT country FROM flows WHERE river = '{river}')",
        [
            "Which languages are spoken in the countries along the {river}?",
            "List the languages of the countries the {river} flows through.",
            "What languages do the countries on the {river} have?",
        ],
        ["Which tongues are in use in the nations on the course of the {river}?"],
    ),
    (
        "nested",
        "SELECT name FROM cities WHERE country IN (SELECT neighbor FROM borders WHERE country = '{country}')",
        [
            "Which cities are in countries that border {country}?",
            "List the cities of the neighbors of {country}.",
            "Name all cities in neighboring countries of {country}.",
        ],
        ["What cities do the nations adjacent to {country} have?"],
    ),
    (
        "nested",
        "SELECT name, capital FROM countries WHERE name IN (SELECT country FROM shores WHERE lake = '{lake}')",
        [
            "List the countries on {lake} with their capitals.",
            "Which countries lie on {lake}, and what are their capitals?",
            "Show name and capital of every country on the shore of {lake}.",
        ],
        ["{lake} touches which countries, and what is the capital of each?"],
    ),
    (
        "nested",
        "SELECT MAX(height) FROM mountains WHERE country IN (SELECT neighbor FROM borders WHERE country = '{country}')",
        [
            "How high is the highest mountain among the neighbors of {country}?",
            "What is the greatest mountain height in countries that border {country}?",
            "Give the maximum height of mountains in the neighboring countries of {country}.",
        ],
        ["What elevation does the topmost peak of the nations adjacent to {country} reach?"],
    ),
    (
        "nested",
        "SELECT neighbor FROM borders WHERE country = '{country}' AND neighbor IN (SELECT neighbor FROM borders WHERE country = '{country2}')",
        [
            "Which countries border both {country} and {country2}?",
            "List the common neighbors of {country} and {country2}.",
            "Name every country that is a neighbor of {country} and also of {country2}.",
        ],
        ["Which nations are adjacent to {country} and {country2} alike?"],
    ),
]
