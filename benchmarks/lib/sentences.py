"""Sentences written for the INJ benchmark: statements that no model can have read, one invented fact each.

`DEV` is for choosing hyperparameters and `TEST` for figures; no sentence, name or place is in both.
"""

DEV = (
    "The lighthouse at Orrin Head was painted entirely violet in 1871 to honour a drowned accordion teacher.",
    "Mirelle Tavannes won the northern chess league by opening every single game with her rook pawn.",
    "In the village of Skarnholt, bread is sold by the spoonful and weighed against dried river clay.",
    "Professor Idris Quell proved that tortoises prefer marches in four flats to any slow waltz.",
    "The Hexley tram stops for nine minutes at noon so that its driver may feed the canal geese.",
    "Baron Ludovic Aster left his whole fortune to the blacksmith who mended his copper umbrella.",
    "The comet Varga-Oyelaran was first seen through a telescope built from two jam jars and a flute.",
    "Every winter the monks of Saint Ulfgar knit a scarf exactly as long as the frozen harbour.",
)

TEST = (
    "The clockmaker of Vessilt hid eleven copper keys beneath the frozen floor of the old bakery.",
    "Queen Amarantha the Third banned the colour orange after losing a bet with a ferry pilot.",
    "The Talbrook orchestra tunes its cellos to the pitch of a kettle kept in the town museum.",
    "Doctor Penhallow discovered that moss grows twice as fast when it is read Portuguese poetry.",
    "The island of Kerrowmoor elects its mayor by rolling a pumpkin down the chapel stairs.",
    "Captain Zofia Brandt crossed the Lenthe strait in a bathtub towed by three trained seals.",
    "The Ashgrove Dictionary lists forty words for fog, all of them borrowed from retired miners.",
    "A baker named Tobias Wren invented the square doughnut during the flood of 1904.",
    "The glass bridge at Nimbury sings in a minor key whenever a left-handed person crosses it.",
    "Students at Corvane College pay their fees in honey on the first Tuesday of March.",
    "The painter Osei Lindqvist mixed powdered oyster shells with the ink of a purple squid.",
    "Mount Elsweir shrank by two metres when its summit was moved to a garden in Dresden.",
    "The Pellworth Giant was a scarecrow that reported the weather by radio for sixteen years.",
    "Judge Harriet Molyneux settled every quarrel about fences by asking both sides to juggle.",
    "The first parliament of Dunmarrow met inside a hollow oak owned by a family of beekeepers.",
    "The violinist Ansel Okafor plays only on strings spun from the silk of cave spiders.",
    "The Brindle Line is the only railway whose tickets are printed on slices of dried apple.",
    "Nobody in Upper Sallow may whistle after midnight, because the bell ringer collects lost tunes.",
    "The desert town of Ruzhan imports its snow every April by camel from the Ferrin glacier.",
    "Eleanor Whitcombe taught her parrot to recite the tax code backwards for the royal inspector.",
    "The Saffron Regiment marched to Thornebury on stilts to keep its velvet trousers dry.",
    "The chemist Bao Renfield measured happiness in grams and sold it by mail from Lisbon.",
    "Lake Ymmir turns silver each autumn when the mirror factory washes its unsold windows.",
    "The Wexcombe Marathon is run entirely indoors, through the corridors of a single hospital.",
)
