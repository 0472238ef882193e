"""What the test questions are about. Nothing named here is named by a training question.

Cities, mountains, lakes and capitals follow their country: those of a held-out country are
held out too, the others are not.
"""

CONTINENTS = ("South America", "Oceania")

COUNTRIES = (
    "Angola",
    "Argentina",
    "Australia",
    "Austria",
    "Bolivia",
    "Colombia",
    "Cuba",
    "Ecuador",
    "Egypt",
    "Ethiopia",
    "Fiji",
    "Finland",
    "Germany",
    "Ghana",
    "Greece",
    "Guatemala",
    "Hungary",
    "Indonesia",
    "Iran",
    "Italy",
    "Jamaica",
    "Japan",
    "Kazakhstan",
    "Kenya",
    "Madagascar",
    "Mexico",
    "Mongolia",
    "Morocco",
    "Mozambique",
    "Nepal",
    "New Zealand",
    "Norway",
    "Panama",
    "Peru",
    "Poland",
    "Portugal",
    "Saudi Arabia",
    "Senegal",
    "Switzerland",
    "Thailand",
    "Tunisia",
    "Turkey",
    "Vietnam",
    "Zambia",
)

LANGUAGES = ("German", "Italian", "Malay", "Portuguese", "Quechua", "Swahili", "Swedish", "Tamil")
CURRENCIES = ("Australian dollar", "East Caribbean dollar", "New Zealand dollar", "Swiss franc", "US dollar")
RIVERS = (
    "Nile",
    "Danube",
    "Mekong",
    "Rhine",
    "Zambezi",
    "Mississippi",
    "Murray",
    "Vistula",
    "Po",
    "Tiber",
    "Tigris",
    "Elbe",
    "Magdalena",
    "Chao Phraya",
    "Orinoco",
    "Amazon",
    "Rio Grande",
    "Inn",
    "Main",
    "Waikato",
    "Shinano",
    "Kura",
    "Karun",
    "Limpopo",
    "Darling",
    "Dnieper",
    "Lena",
)
SEAS = (
    "Gulf of Mexico",
    "North Sea",
    "Caspian Sea",
    "Baltic Sea",
    "Danube",
    "Rhine",
    "Mississippi",
    "Shatt al-Arab",
    "Murray",
)
RANGES = ("Himalayas", "Caucasus", "Rocky Mountains", "Scandinavian Mountains", "Southern Alps")
LAKES = ("Lake Victoria", "Lake Superior", "Lake Erie", "Lake Malawi", "Lake Geneva", "Lake Ladoga")
