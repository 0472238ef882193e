"""Question patterns that count, aggregate, order or group. The form is patterns_plain.py's."""

COUNTS = [
    ("count", "SELECT COUNT(*) FROM countries WHERE continent = '{continent}'", [
        "How many countries are in {continent}?", "Count the countries of {continent}.",
        "What is the number of countries in {continent}?", "How many countries does {continent} have?",
        "Give the number of countries on the continent {continent}.", "Number of countries in {continent}?",
    ], ["{continent} is made up of how many nations?", "How many states make up {continent}?"]),
    ("count", "SELECT COUNT(*) FROM borders WHERE country = '{country}'", [
        "How many neighbors does {country} have?", "How many countries border {country}?",
        "Count the neighbors of {country}.", "What is the number of countries that border {country}?",
        "With how many countries does {country} share a border?",
    ], ["{country} is adjacent to how many nations?", "How many land borders does {country} keep?"]),
    ("count", "SELECT COUNT(*) FROM languages WHERE country = '{country}'", [
        "How many languages are spoken in {country}?", "How many languages does {country} have?",
        "Count the languages of {country}.", "What is the number of languages in {country}?",
    ], ["How many tongues are in use in {country}?"]),
    ("count", "SELECT COUNT(*) FROM languages WHERE language = '{language}'", [
        "In how many countries is {language} spoken?", "How many countries speak {language}?",
        "Count the countries where {language} is a language.", "What is the number of countries that speak {language}?",
    ], ["How many nations count {language} among their languages?"]),
    ("count", "SELECT COUNT(*) FROM cities WHERE country = '{country}'", [
        "How many cities are in {country}?", "Count the cities of {country}.", "How many cities does {country} have?",
        "What is the number of cities in {country}?", "Give the number of cities in {country}.",
    ], ["How many urban centres (cities) are recorded for {country}?"]),
    ("count", "SELECT COUNT(*) FROM countries WHERE currency = '{currency}'", [
        "How many countries use the {currency}?", "Count the countries that pay with the {currency}.",
        "What is the number of countries with the {currency}?", "In how many countries is the {currency} the currency?",
    ], ["In how many states is the {currency} legal tender?"]),
    ("count", "SELECT COUNT(*) FROM flows WHERE river = '{river}'", [
        "Through how many countries does the {river} flow?", "How many countries does the {river} run through?",
        "Count the countries along the {river}.", "How many countries lie on the {river}?",
    ], ["A trip down the whole {river} would visit how many countries?"]),
    ("count", "SELECT COUNT(*) FROM flows WHERE country = '{country}'", [
        "How many rivers flow through {country}?", "Count the rivers of {country}.",
        "What is the number of rivers in {country}?", "How many rivers does {country} have?",
    ], ["How many waterways (rivers) cross {country}?"]),
    ("count", "SELECT COUNT(*) FROM mountains WHERE range = '{range}'", [
        "How many mountains are in the {range}?", "Count the mountains of the {range}.",
        "What is the number of mountains in the {range}?", "How many mountains does the {range} have?",
    ], ["How many summits make up the {range}?"]),
    ("count", "SELECT COUNT(*) FROM countries WHERE population > {people}", [
        "How many countries have more than {people} people?", "Count the countries with over {people} inhabitants.",
        "What is the number of countries with a population above {people}?", "How many countries have a population greater than {people}?",
    ], ["How many nations are home to upwards of {people} people?"]),
    ("count", "SELECT COUNT(*) FROM rivers WHERE length > {length}", [
        "How many rivers are longer than {length} kilometres?", "Count the rivers with a length over {length} km.",
        "What is the number of rivers longer than {length} km?", "How many rivers are more than {length} kilometres long?",
    ], ["How many rivers stretch beyond {length} km?"]),
    ("count", "SELECT COUNT(*) FROM mountains WHERE country = '{country}' AND height > {height}", [
        "How many mountains in {country} are higher than {height} metres?", "Count the mountains of {country} above {height} m.",
        "What is the number of mountains in {country} taller than {height} metres?",
        "How many mountains of {country} have a height of more than {height} m?",
    ], ["How many peaks of {country} rise beyond {height} metres?"]),
]

AGGREGATES = [
    ("aggregate", "SELECT SUM(population) FROM countries WHERE continent = '{continent}'", [
        "What is the total population of {continent}?", "How many people live in {continent} in total?",
        "Give the sum of the populations of all countries in {continent}.", "Add up the population of {continent}.",
        "How many inhabitants do the countries of {continent} have together?",
    ], ["Altogether, how many people call {continent} home?"]),
    ("aggregate", "SELECT AVG(population) FROM countries WHERE continent = '{continent}'", [
        "What is the average population of the countries in {continent}?", "How many people does a country in {continent} have on average?",
        "Give the mean population of countries in {continent}.", "Average population per country in {continent}?",
    ], ["What is the typical (mean) headcount of a nation in {continent}?"]),
    ("aggregate", "SELECT SUM(area) FROM countries WHERE continent = '{continent}'", [
        "What is the total area of the countries in {continent}?", "How large is {continent} in total?",
        "Give the sum of the areas of all countries in {continent}.", "Add up the area of {continent}.",
    ], ["Altogether, how many square kilometres do the states of {continent} take up?"]),
    ("aggregate", "SELECT AVG(area) FROM countries WHERE continent = '{continent}'", [
        "What is the average area of the countries in {continent}?", "How large is a country in {continent} on average?",
        "Give the mean area of countries in {continent}.", "Average area per country in {continent}?",
    ], ["What is the typical (mean) territory size of a nation in {continent}?"]),
    ("aggregate", "SELECT MAX(height) FROM mountains WHERE country = '{country}'", [
        "What is the greatest height of a mountain in {country}?", "How high is the highest mountain in {country}?",
        "Give the height of the tallest mountain of {country}.", "What is the maximum mountain height in {country}?",
    ], ["What elevation does the topmost peak of {country} reach?"]),
    ("aggregate", "SELECT AVG(height) FROM mountains WHERE range = '{range}'", [
        "What is the average height of the mountains in the {range}?", "How high are the mountains of the {range} on average?",
        "Give the mean height of mountains in the {range}.", "Average mountain height in the {range}?",
    ], ["What is the typical (mean) elevation in the {range}?"]),
    ("aggregate", "SELECT MIN(height) FROM mountains WHERE range = '{range}'", [
        "What is the smallest height of a mountain in the {range}?", "How high is the lowest mountain in the {range}?",
        "Give the height of the lowest mountain of the {range}.", "What is the minimum mountain height in the {range}?",
    ], ["What elevation does the least tall peak of the {range} reach?"]),
    ("aggregate", "SELECT SUM(population) FROM cities WHERE country = '{country}'", [
        "What is the total population of the cities in {country}?", "How many people live in the cities of {country} in total?",
        "Give the sum of the city populations in {country}.", "Add up the population of all cities in {country}.",
    ], ["Altogether, how many people call the cities of {country} home?"]),
    ("aggregate", "SELECT AVG(population) FROM cities WHERE country = '{country}'", [
        "What is the average population of the cities in {country}?", "How many people does a city in {country} have on average?",
        "Give the mean population of cities in {country}.", "Average city population in {country}?",
    ], ["What is the typical (mean) headcount of a city in {country}?"]),
    ("aggregate", "SELECT MAX(length) FROM rivers WHERE mouth = '{sea}'", [
        "How long is the longest river that flows into the {sea}?", "What is the greatest length of a river ending in the {sea}?",
        "Give the length of the longest river whose mouth is the {sea}.", "What is the maximum length among rivers into the {sea}?",
    ], ["Of the rivers that discharge into the {sea}, what is the top length?"]),
]

ORDERS = [
    ("order", "SELECT name FROM countries WHERE continent = '{continent}' ORDER BY {up} DESC LIMIT 1", [
        "Which country in {continent} has the largest {up}?", "What is the country with the greatest {up} in {continent}?",
        "Name the country of {continent} with the highest {up}.", "In {continent}, which country is first by {up}?",
        "Find the country in {continent} whose {up} is the biggest.",
    ], ["By {up}, what is the number one nation in {continent}?", "Which nation tops {continent} in {up}?"]),
    ("order", "SELECT name FROM countries WHERE continent = '{continent}' ORDER BY {up} LIMIT 1", [
        "Which country in {continent} has the smallest {up}?", "What is the country with the least {up} in {continent}?",
        "Name the country of {continent} with the lowest {up}.", "In {continent}, which country is last by {up}?",
        "Find the country in {continent} whose {up} is the smallest.",
    ], ["By {up}, what is the tiniest nation in {continent}?"]),
    ("order", "SELECT name FROM countries WHERE continent = '{continent}' ORDER BY {up} DESC LIMIT {n}", [
        "What are the {n} countries with the largest {up} in {continent}?", "List the top {n} countries in {continent} by {up}.",
        "Name the {n} countries of {continent} with the highest {up}.", "Show the {n} biggest countries in {continent} by {up}.",
        "Which {n} countries in {continent} have the greatest {up}?",
    ], ["Rank the leading {n} nations of {continent} by {up}.", "Which {n} nations top {continent} in {up}?"]),
    ("order", "SELECT name FROM countries ORDER BY {up} DESC LIMIT {n}", [
        "What are the {n} countries with the largest {up}?", "List the top {n} countries of the world by {up}.",
        "Name the {n} countries with the highest {up}.", "Which {n} countries have the greatest {up}?",
    ], ["Worldwide, rank the leading {n} nations by {up}."]),
    ("order", "SELECT name FROM countries ORDER BY {up} LIMIT {n}", [
        "What are the {n} countries with the smallest {up}?", "List the {n} countries with the lowest {up}.",
        "Name the {n} countries of the world with the least {up}.", "Which {n} countries have the smallest {up}?",
    ], ["Worldwide, what are the bottom {n} nations by {up}?"]),
    ("order", "SELECT name FROM cities WHERE country = '{country}' ORDER BY population DESC LIMIT 1", [
        "What is the largest city in {country}?", "Which city in {country} has the most people?",
        "Name the biggest city of {country}.", "What is the most populous city of {country}?",
        "Which city of {country} has the largest population?",
    ], ["In which city do more people live than in any other in {country}?", "What's the number one city of {country} by population?"]),
    ("order", "SELECT name FROM cities ORDER BY population DESC LIMIT {n}", [
        "What are the {n} largest cities?", "List the top {n} cities by population.", "Name the {n} most populous cities of the world.",
        "Show the {n} biggest cities.", "Which {n} cities have the most people?",
    ], ["Worldwide, rank the leading {n} cities by inhabitants."]),
    ("order", "SELECT name FROM mountains WHERE country = '{country}' ORDER BY height DESC LIMIT 1", [
        "What is the highest mountain in {country}?", "Which mountain in {country} is the tallest?",
        "Name the highest peak of {country}.", "What is the tallest mountain of {country}?",
    ], ["Which summit is the roof of {country}?"]),
    ("order", "SELECT name FROM mountains WHERE range = '{range}' ORDER BY height DESC LIMIT {n}", [
        "What are the {n} highest mountains in the {range}?", "List the top {n} mountains of the {range} by height.",
        "Name the {n} tallest mountains in the {range}.", "Which {n} mountains of the {range} are the highest?",
    ], ["Rank the leading {n} peaks of the {range} by elevation."]),
    ("order", "SELECT name FROM mountains ORDER BY height DESC LIMIT {n}", [
        "What are the {n} highest mountains in the world?", "List the top {n} mountains by height.",
        "Name the {n} tallest mountains.", "Which {n} mountains are the highest?",
    ], ["Worldwide, rank the leading {n} peaks by elevation."]),
    ("order", "SELECT name FROM rivers ORDER BY length DESC LIMIT {n}", [
        "What are the {n} longest rivers?", "List the top {n} rivers by length.", "Name the {n} longest rivers of the world.",
        "Which {n} rivers are the longest?",
    ], ["Worldwide, rank the leading {n} rivers by kilometres."]),
    ("order", "SELECT name FROM lakes ORDER BY {lakeby} DESC LIMIT {n}", [
        "What are the {n} lakes with the greatest {lakeby}?", "List the top {n} lakes by {lakeby}.",
        "Name the {n} lakes with the largest {lakeby}.", "Which {n} lakes have the greatest {lakeby}?",
    ], ["Worldwide, rank the leading {n} lakes by {lakeby}."]),
    ("order", "SELECT name FROM rivers WHERE mouth = '{sea}' ORDER BY length DESC", [
        "List the rivers that flow into the {sea}, longest first.", "Show rivers ending in the {sea} sorted by length, longest first.",
        "Name the rivers into the {sea} from longest to shortest.", "Which rivers flow into the {sea}? Sort by length descending.",
    ], ["Put the rivers that discharge into the {sea} in order, starting with the longest."]),
    ("order", "SELECT name FROM cities WHERE country = '{country}' ORDER BY population", [
        "List the cities of {country} from smallest to largest.", "Show the cities in {country} sorted by population, smallest first.",
        "Name the cities of {country} ordered by population ascending.", "Which cities are in {country}? Start with the smallest.",
    ], ["Put the cities of {country} in order, the least populous one leading."]),
    ("order", "SELECT name FROM countries WHERE continent = '{continent}' ORDER BY name LIMIT {n}", [
        "List the first {n} countries of {continent} in alphabetical order.", "Which {n} countries come first in {continent} alphabetically?",
        "Name the alphabetically first {n} countries in {continent}.", "Show {n} countries of {continent}, sorted by name.",
    ], ["From A onwards, what are the {n} opening nations of {continent}?"]),
]
