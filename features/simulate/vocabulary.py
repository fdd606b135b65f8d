"""Vocabulary of simulated reviews and items; each bank has a row of phrases per level, pole or rating.

Two neighbouring rows of ADJECTIVES, NOUNS and CATEGORIES are the negative and the positive pole of one latent factor.
No phrase may hold a quote or a backslash: they are put into JSON as they are.
"""

Bank = tuple[tuple[str, ...], ...]

# (adjectives, nouns, category) of the negative and the positive pole of each factor
FACTORS: tuple[tuple[tuple[str, str, str], tuple[str, str, str]], ...] = (
    (
        ("dark|bleak|gritty|grim", "murder|crime|despair", "Noir"),
        ("cheerful|sunny|uplifting|bright", "joy|friendship|hope", "Feel-Good"),
    ),
    (
        ("calm|gentle|slow|quiet", "gardens|silence|meditation", "Relaxing"),
        ("thrilling|tense|fast|explosive", "chases|danger|battles", "Action"),
    ),
    (
        ("historical|ancient|medieval|royal", "kings|castles|empires", "History"),
        ("futuristic|robotic|cosmic|digital", "spaceships|robots|planets", "Science Fiction"),
    ),
    (
        ("serious|scholarly|factual|political", "economics|law|politics", "Documentary"),
        ("funny|silly|witty|hilarious", "jokes|pranks|comedians", "Comedy"),
    ),
    (
        ("scary|ghostly|creepy|haunted", "ghosts|vampires|nightmares", "Horror"),
        ("romantic|tender|passionate|loving", "weddings|kisses|love", "Romance"),
    ),
    (
        ("rural|pastoral|western|dusty", "horses|farms|cowboys", "Country"),
        ("urban|modern|fashionable|glamorous", "nightclubs|skyscrapers|celebrities", "City Life"),
    ),
    (
        ("sporty|athletic|muddy|competitive", "football|boxing|marathons", "Sports"),
        ("artistic|poetic|musical|painterly", "ballet|painting|opera", "Arts"),
    ),
    (
        ("childlike|cute|cosy|playful", "puppies|toys|fairies", "Children"),
        ("adult|philosophical|cynical|intellectual", "existentialism|psychology|memory", "Philosophy"),
    ),
)

_POLES = tuple(pole for factor in FACTORS for pole in factor)
ADJECTIVES: Bank = tuple(tuple(adjectives.split("|")) for adjectives, _, _ in _POLES)
NOUNS: Bank = tuple(tuple(nouns.split("|")) for _, nouns, _ in _POLES)
CATEGORIES: Bank = tuple((category,) for _, _, category in _POLES)

THINGS: Bank = (("Story", "World", "Book", "Secret", "Song", "House", "Return", "Art"),)
ASPECTS: Bank = (("mood", "style", "tone", "atmosphere", "side of it"),)
REACTIONS: Bank = (
    (" put me off.", " was not for me.", " bored me.", " is what I disliked."),
    (" drew me in.", " was just right for me.", " delighted me.", " is what I loved."),
)
PREFERENCES: Bank = (("I always look for ", "My favourites are ", "I would rather have ", "Give me "),)

# by rating, 1 to 5
SENTIMENT: Bank = (
    (
        "Terrible, a complete waste of money and time.",
        "Awful, one of the worst I have ever bought.",
        "I hated it and gave up.",
    ),
    (
        "Disappointing and not really worth the price.",
        "Rather weak, I expected much better than this.",
        "Below average, with too many faults.",
    ),
    (
        "It is okay, neither good nor bad overall.",
        "An average one, fine but quickly forgotten.",
        "Mixed feelings, some of it works for me.",
    ),
    (
        "Really good, I enjoyed nearly all of it.",
        "A solid choice that I can recommend.",
        "Very nice, with only small weaknesses.",
    ),
    (
        "Absolutely wonderful, I love everything about it.",
        "A masterpiece, one of the best I know.",
        "Perfect, I could not be happier with it.",
    ),
)
TITLES: Bank = (
    ("Terrible", "Avoid", "Awful"),
    ("Disappointing", "Not great", "Weak"),
    ("Okay", "Average", "So-so"),
    ("Good", "Recommended", "Very nice"),
    ("Wonderful", "Loved it", "Perfect"),
)
SHORT: Bank = (("Awful.", "No good at all."), ("Not great.",), ("It is okay.",), ("Good one.",), ("Love it!", "Great."))

# by level of leniency, from the harshest reviewer to the mildest
LENIENCY: Bank = (
    ("I am a harsh critic and almost never satisfied.", "I give hardly anything a high mark."),
    ("I am rather strict and hard to please.", "I tend to notice every flaw."),
    ("I try to judge fairly and give what is due.", "My marks are usually balanced."),
    ("I am fairly easy to please and mark kindly.", "I tend to see the good in most things."),
    ("I am generous and happy with nearly everything.", "I love giving top marks to everyone."),
)

# by level of quality, from the poorest item to the best
QUALITY: Bank = (
    ("A badly made cheap product with many complaints.", "A sloppy, flawed and much returned release."),
    ("A modest budget release with some rough edges.", "A mediocre and forgettable release."),
    ("A standard release of ordinary quality.", "A decent and conventional release."),
    ("A well made and well reviewed release.", "A fine release, praised by many."),
    ("An award-winning masterpiece, acclaimed by critics.", "An outstanding prize-winning bestseller."),
)
