"""The demo's English and Arabic text, written for this package: questions, topics, answers good and bad.

Data only. ``{do}`` in a question is filled with a topic's ``do`` (in Arabic a verbal noun). A topic's ``key``
begins a word of each of its tips and of no other topic's. Topics stand in the same order in both languages.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """Something to ask about, in one language."""

    do: str
    key: str
    tips: tuple[str, str]


QUESTIONS = {
    "en": (
        "How do I {do}?",
        "Can you tell me how to {do}?",
        "What is the best way to {do}?",
        "I have never tried to {do}. Any advice?",
        "I want to {do} today. Where do I start?",
        "My friend wants to {do}. What should I tell her?",
        "Please explain to me how to {do}.",
        "Is it hard to {do}?",
        "I would like to {do}. What do you suggest?",
        "What should I know before I {do}?",
        "Teach me how to {do}.",
        "I need to {do}, but I am not sure how.",
    ),
    "ar": (
        "كيف يمكنني {do}؟",
        "هل يمكنك مساعدتي في {do}؟",
        "ما النصيحة الأهم عند {do}؟",
        "لم أجرب {do} من قبل، فبماذا تنصحني؟",
        "أريد {do} اليوم، فمن أين أبدأ؟",
        "صديقتي ترغب في {do}، فماذا أقول لها؟",
        "من فضلك اشرح لي كيفية {do}.",
        "هل من الصعب {do}؟",
        "أود {do}، فما رأيك؟",
        "ماذا علي أن أعرف قبل {do}؟",
        "علمني طريقة {do}.",
        "أحتاج إلى {do} ولا أعرف كيف.",
    ),
}

OPENERS = {
    "en": (
        "Gladly!",
        "I am happy to help.",
        "Of course!",
        "What a nice question!",
        "With pleasure.",
    ),
    "ar": ("بكل سرور!", "يسعدني أن أساعدك.", "بالطبع!", "سؤال جميل!", "على الرحب والسعة."),
}

CLOSERS = {
    "en": ("Enjoy!", "Good luck!", "I hope this helps.", "You can do it!"),
    "ar": ("بالتوفيق!", "أتمنى لك وقتا ممتعا.", "أرجو أن يفيدك هذا.", "أنت قادر على ذلك!"),
}

RUDE = {
    "en": (
        "What a silly question.",
        "Stop wasting my time.",
        "Only a fool would ask that.",
        "You will never manage it anyway.",
        "Look it up yourself.",
    ),
    "ar": (
        "يا له من سؤال سخيف.",
        "لا تضيع وقتي.",
        "لا يسأل عن هذا إلا أحمق.",
        "لن تنجح في ذلك أبدا.",
        "ابحث عن الجواب بنفسك.",
    ),
}

EVASIVE = {
    "en": (
        "It depends.",
        "I cannot say anything about that.",
        "Maybe, maybe not.",
        "Ask someone else.",
        "There are many opinions on this.",
    ),
    "ar": (
        "الأمر يتوقف على الظروف.",
        "لا أستطيع قول شيء عن ذلك.",
        "ربما نعم وربما لا.",
        "اسأل شخصا آخر.",
        "الآراء في هذا كثيرة.",
    ),
}

TOPICS = {
    "en": (
        Topic(
            "make mint tea",
            "mint",
            (
                "Pour hot water over fresh mint leaves and wait five minutes.",
                "Crush the mint a little, add hot water and a spoon of sugar.",
            ),
        ),
        Topic(
            "boil an egg",
            "egg",
            (
                "Lower the egg into boiling water and take it out after eight minutes.",
                "Cool the egg in cold water after cooking, then peel it.",
            ),
        ),
        Topic(
            "cook rice",
            "rice",
            (
                "Wash the rice, add two cups of water for each cup and cover the pot.",
                "Cook the rice on a low flame and do not stir it.",
            ),
        ),
        Topic(
            "bake bread",
            "dough",
            (
                "Knead the dough for ten minutes and let it rest for an hour.",
                "Let the dough rise in a warm place before it goes into the oven.",
            ),
        ),
        Topic(
            "make lentil soup",
            "lentil",
            (
                "Simmer the lentils with an onion and a carrot until they are soft.",
                "Rinse the lentils, cook them gently and add cumin and lemon.",
            ),
        ),
        Topic(
            "grow tomatoes",
            "tomato",
            (
                "Give the tomato plants full sun and tie them to a stick.",
                "Plant the tomatoes after the last frost and feed them every two weeks.",
            ),
        ),
        Topic(
            "water a cactus",
            "cactus",
            (
                "Water the cactus only when its soil is quite dry.",
                "Keep the cactus almost dry in winter and in bright light.",
            ),
        ),
        Topic(
            "plant a rose",
            "rose",
            (
                "Dig a wide hole, set the rose in it and press the earth down.",
                "Choose a sunny spot for the rose and prune it in spring.",
            ),
        ),
        Topic(
            "clean a window",
            "glass",
            (
                "Wipe the glass with vinegar and water, then dry it with newspaper.",
                "Clean the glass on a cloudy day so that it does not dry too fast.",
            ),
        ),
        Topic(
            "sew on a button",
            "button",
            (
                "Pass the needle through each hole of the button four times and tie a knot.",
                "Choose a thread of the same colour and sew the button loosely.",
            ),
        ),
        Topic(
            "iron a shirt",
            "collar",
            (
                "Begin with the collar, then do the sleeves and the back.",
                "Dampen the cloth and iron the collar from the points inward.",
            ),
        ),
        Topic(
            "repair a flat tire",
            "tire",
            (
                "Take the tire off, find the hole and glue a patch on it.",
                "Check the inside of the tire for thorns before you pump it up.",
            ),
        ),
        Topic(
            "learn to swim",
            "pool",
            (
                "Start in the shallow end of the pool and practise floating.",
                "Hold the edge of the pool, kick your legs and breathe calmly.",
            ),
        ),
        Topic(
            "train for a long run",
            "run",
            (
                "Run three times a week and add a little distance each time.",
                "Run slowly enough to talk, and rest one day between.",
            ),
        ),
        Topic(
            "sleep better",
            "bed",
            (
                "Go to bed at the same hour and put your phone away.",
                "Keep your bed room dark and cool, and avoid late coffee.",
            ),
        ),
        Topic(
            "learn a new language",
            "words",
            (
                "Learn ten new words a day and use them in short sentences.",
                "Listen to songs, write down the words and say them aloud.",
            ),
        ),
        Topic(
            "write a thank-you letter",
            "letter",
            (
                "Open the letter with the name and say exactly what you are thankful for.",
                "Keep the letter short and warm, and write it by hand.",
            ),
        ),
        Topic(
            "save some money",
            "money",
            (
                "Write down where your money goes for a month, then set a limit.",
                "Put some money aside on the first day of each month.",
            ),
        ),
        Topic(
            "take a good photo",
            "photo",
            (
                "Take the photo with the sun behind you and hold still.",
                "Move closer, and put the subject of the photo off the centre.",
            ),
        ),
        Topic(
            "play the guitar",
            "guitar",
            (
                "Tune the guitar first and practise two chords slowly.",
                "Play the guitar for fifteen minutes every day.",
            ),
        ),
        Topic(
            "paint a wall",
            "paint",
            (
                "Cover the floor, then roll the paint on from top to bottom.",
                "Let the first coat of paint dry before you add another.",
            ),
        ),
        Topic(
            "calm a crying baby",
            "baby",
            (
                "Hold the baby close and hum a quiet song.",
                "Check whether the baby is hungry or sleepy, and rock it gently.",
            ),
        ),
        Topic(
            "teach a dog to sit",
            "dog",
            (
                "Hold a treat above the dog and praise it when it sits.",
                "Train the dog for a few minutes at a time and stay patient.",
            ),
        ),
        Topic(
            "pack a suitcase",
            "suitcase",
            (
                "Put shoes at the bottom of the suitcase and roll your clothes.",
                "Make a list first, and fill the suitcase from heavy to light.",
            ),
        ),
    ),
    "ar": (
        Topic(
            "إعداد الشاي بالنعناع",
            "النعناع",
            (
                "صب الماء الساخن على أوراق النعناع وانتظر خمس دقائق.",
                "اهرس النعناع قليلا ثم أضف الماء الساخن وملعقة من السكر.",
            ),
        ),
        Topic(
            "سلق البيض",
            "البيض",
            (
                "ضع البيض في ماء يغلي وأخرجه بعد ثماني دقائق.",
                "برد البيض في ماء بارد بعد الطهي ثم قشره.",
            ),
        ),
        Topic(
            "طبخ الأرز",
            "الأرز",
            (
                "اغسل الأرز وأضف كوبين من الماء لكل كوب وغط القدر.",
                "اطبخ الأرز على نار هادئة ولا تحركه.",
            ),
        ),
        Topic(
            "خبز الخبز في البيت",
            "العجين",
            (
                "اعجن العجين عشر دقائق واتركه يرتاح ساعة.",
                "دع العجين يرتفع في مكان دافئ قبل إدخاله إلى الفرن.",
            ),
        ),
        Topic(
            "تحضير شوربة العدس",
            "العدس",
            (
                "اطه العدس مع بصلة وجزرة حتى يلين.",
                "اغسل العدس واطهه برفق ثم أضف الكمون والليمون.",
            ),
        ),
        Topic(
            "زراعة الطماطم",
            "الطماطم",
            (
                "ضع نبات الطماطم في الشمس واربطه بعصا.",
                "ازرع الطماطم بعد انتهاء البرد وسمدها كل أسبوعين.",
            ),
        ),
        Topic(
            "سقي الصبار",
            "الصبار",
            (
                "اسق الصبار فقط عندما تجف تربته تماما.",
                "اترك الصبار شبه جاف في الشتاء وفي ضوء قوي.",
            ),
        ),
        Topic(
            "غرس الورد",
            "الورد",
            (
                "احفر حفرة واسعة وضع الورد فيها ثم اضغط التراب.",
                "اختر مكانا مشمسا لشجيرة الورد وقلمها في الربيع.",
            ),
        ),
        Topic(
            "تنظيف النوافذ",
            "الزجاج",
            (
                "امسح الزجاج بالماء والخل ثم جففه بورق الجرائد.",
                "نظف الزجاج في يوم غائم حتى لا يجف بسرعة.",
            ),
        ),
        Topic(
            "خياطة زر القميص",
            "الزر",
            (
                "مرر الإبرة في كل ثقب من الزر أربع مرات واعقد الخيط.",
                "اختر خيطا من اللون نفسه وخط الزر دون شد.",
            ),
        ),
        Topic(
            "كي الثياب",
            "المكواة",
            (
                "ابدأ بالياقة وحرك المكواة نحو الأكمام ثم الظهر.",
                "رطب القماش قليلا واضبط حرارة المكواة حسب نوعه.",
            ),
        ),
        Topic(
            "إصلاح إطار الدراجة",
            "الإطار",
            (
                "فك الإطار وابحث عن الثقب وألصق عليه رقعة.",
                "افحص داخل الإطار من الشوك قبل أن تنفخه.",
            ),
        ),
        Topic(
            "تعلم السباحة",
            "المسبح",
            (
                "ابدأ في الجزء الضحل من المسبح وتدرب على الطفو.",
                "أمسك بحافة المسبح وحرك ساقيك وتنفس بهدوء.",
            ),
        ),
        Topic(
            "التدرب على الجري",
            "اركض",
            (
                "اركض ثلاث مرات في الأسبوع وزد المسافة قليلا كل مرة.",
                "اركض ببطء يسمح لك بالكلام واسترح يوما بعد يوم.",
            ),
        ),
        Topic(
            "تحسين النوم",
            "السرير",
            (
                "اذهب إلى السرير في الموعد نفسه وأبعد هاتفك.",
                "اجعل الغرفة مظلمة ولا تشرب القهوة قبل الذهاب إلى السرير.",
            ),
        ),
        Topic(
            "تعلم لغة جديدة",
            "كلمات",
            (
                "احفظ عشر كلمات جديدة كل يوم واستعملها في جمل قصيرة.",
                "استمع إلى الأغاني واكتب كلمات منها وانطقها بصوت عال.",
            ),
        ),
        Topic(
            "كتابة رسالة شكر",
            "الرسالة",
            (
                "ابدأ الرسالة بالاسم واذكر ما تشكره عليه.",
                "اجعل الرسالة قصيرة ودافئة واكتبها بخط يدك.",
            ),
        ),
        Topic(
            "توفير النقود",
            "المال",
            (
                "سجل أين تنفق المال مدة شهر ثم ضع حدا.",
                "ادخر شيئا من المال في أول يوم من كل شهر.",
            ),
        ),
        Topic(
            "التقاط صور جميلة",
            "الصورة",
            (
                "التقط الصورة والشمس خلفك ولا تتحرك.",
                "اقترب أكثر ولا تضع الهدف في وسط الصورة.",
            ),
        ),
        Topic(
            "العزف على العود",
            "العود",
            (
                "اضبط أوتار العود أولا وتدرب على نغمتين ببطء.",
                "اعزف على العود ربع ساعة كل يوم.",
            ),
        ),
        Topic(
            "طلاء الجدار",
            "الطلاء",
            (
                "غط الأرض ثم ضع الطلاء من الأعلى إلى الأسفل.",
                "انتظر حتى يجف الطلاء الأول قبل أن تضيف طبقة أخرى.",
            ),
        ),
        Topic(
            "تهدئة طفل يبكي",
            "الطفل",
            (
                "احمل الطفل قريبا منك وغن له بصوت هادئ.",
                "تأكد هل الطفل جائع أو متعب وهزه برفق.",
            ),
        ),
        Topic(
            "تدريب الكلب على الجلوس",
            "الكلب",
            (
                "ارفع الطعام فوق رأس الكلب وامدحه حين يجلس.",
                "درب الكلب بضع دقائق كل مرة وكن صبورا.",
            ),
        ),
        Topic(
            "ترتيب حقيبة السفر",
            "الحقيبة",
            (
                "ضع الأحذية في أسفل الحقيبة ولف الملابس.",
                "اكتب قائمة أولا واملأ الحقيبة من الثقيل إلى الخفيف.",
            ),
        ),
    ),
}
