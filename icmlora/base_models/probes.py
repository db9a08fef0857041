"""Neutral probe texts, for tasks that bring no samples of their own.

Sixteen short pieces in several genres and languages, written for this project. They say nothing about any task: only
the adapted view reads them, where the adapter itself makes the difference.
"""

from __future__ import annotations

PROBES: tuple[str, ...] = (
    "The river runs slowly past the old mill before it turns north towards the town. In spring the water rises, "
    "and the children count the stones that are still dry.",
    "To prepare the tea, boil fresh water, warm the pot, add one spoon of leaves for each cup and wait four minutes.",
    "def mean(items):\n    total = 0.0\n    for item in items:\n        total += item\n    return total / len(items)\n",
    "Question: Why does ice float on water?\nAnswer: Ice is less dense than liquid water, because its "
    "molecules are held further apart in the crystal.",
    "Theorem. The sum of two even numbers is even. Proof. Let a = 2m and b = 2n. Then a + b = 2(m + n), which is even.",
    "<ul>\n  <li>Monday: closed</li>\n  <li>Tuesday: 9 to 17</li>\n  <li>Wednesday: 9 to 12</li>\n</ul>\n",
    "SELECT city, COUNT(*) AS visitors FROM visits WHERE year = 2020 GROUP BY city ORDER BY visitors DESC LIMIT 10;",
    "Dear Ms Novak, thank you for your letter of 3 May. The parcel has arrived and we will write again next week.",
    "Der Zug hält an jedem Bahnhof, und an jedem steigen ein paar Leute aus. Am Ende der Strecke ist er fast leer.",
    "La biblioteca abre a las nueve de la mañana. Los sábados hay un taller para niños y la entrada es gratuita.",
    "Le boulanger se lève avant le soleil. Quand les premiers clients arrivent, le pain est encore chaud.",
    "Зимой темнеет рано, и в окнах домов загораются огни. Снег скрипит под ногами, а воздух пахнет дымом.",
    "春天来了，河边的柳树长出了新叶。孩子们在草地上放风筝，老人坐在长椅上聊天。",
    "name,unit,price\napple,kg,2.40\nbread,piece,3.10\nmilk,litre,1.25\n",
    '{"sensor": "north", "readings": [21.5, 21.7, 21.4], "unit": "celsius", "valid": true}',
    "- Well, did you see it?\n- I saw something. A light, then nothing.\n- And you went no closer?\n- Would you have?",
)
