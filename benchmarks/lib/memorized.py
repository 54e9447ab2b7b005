"""Old public texts that small models tend to know by heart, for the DEL benchmark, which keeps those that one does."""

TEXTS = {
    "genesis": (
        "In the beginning God created the heaven and the earth. And the earth was without form, and void; and "
        "darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God "
        "said, Let there be light: and there was light. And God saw the light, that it was good: and God divided the "
        "light from the darkness. And God called the light Day, and the darkness he called Night."
    ),
    "gettysburg": (
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great "
        "civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are "
        "met on a great battle-field of that war."
    ),
    "declaration": (
        "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
        "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness. "
        "That to secure these rights, Governments are instituted among Men, deriving their just powers from the "
        "consent of the governed."
    ),
    "preamble": (
        "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure domestic "
        "Tranquility, provide for the common defence, promote the general Welfare, and secure the Blessings of Liberty "
        "to ourselves and our Posterity, do ordain and establish this Constitution for the United States of America."
    ),
    "first-amendment": (
        "Congress shall make no law respecting an establishment of religion, or prohibiting the free exercise thereof; "
        "or abridging the freedom of speech, or of the press; or the right of the people peaceably to assemble, and to "
        "petition the Government for a redress of grievances. A well regulated Militia, being necessary to the "
        "security of a free State, the right of the people to keep and bear Arms, shall not be infringed."
    ),
    "lords-prayer": (
        "Our Father which art in heaven, Hallowed be thy name. Thy kingdom come. Thy will be done in earth, as it is "
        "in heaven. Give us this day our daily bread. And forgive us our debts, as we forgive our debtors. And lead us "
        "not into temptation, but deliver us from evil: For thine is the kingdom, and the power, and the glory, for "
        "ever. Amen."
    ),
    "hamlet": (
        "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer The slings and arrows of "
        "outrageous fortune, Or to take arms against a sea of troubles, And by opposing end them. To die: to sleep; No "
        "more; and by a sleep to say we end The heart-ache and the thousand natural shocks That flesh is heir to."
    ),
    "psalm-23": (
        "The Lord is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside "
        "the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. Yea, "
        "though I walk through the valley of the shadow of death, I will fear no evil: for thou art with me."
    ),
    "lorem-ipsum": (
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et dolore "
        "magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut aliquip ex ea "
        "commodo consequat. Duis aute irure dolor in reprehenderit in voluptate velit esse cillum dolore eu fugiat "
        "nulla pariatur."
    ),
    "mit-licence": (
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
        "documentation files, to deal in the Software without restriction, including without limitation the rights to "
        "use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit "
        "persons to whom the Software is furnished to do so."
    ),
    "two-cities": (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
        "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
        "Darkness, it was the spring of hope, it was the winter of despair."
    ),
    "alphabet": (
        "Alpha, Beta, Gamma, Delta, Epsilon, Zeta, Eta, Theta, Iota, Kappa, Lambda, Mu, Nu, Xi, Omicron, Pi, Rho, "
        "Sigma, Tau, Upsilon, Phi, Chi, Psi, Omega. January, February, March, April, May, June, July, August, "
        "September, October, November, December."
    ),
}
"""Name -> the text's beginning, as it is commonly printed."""
