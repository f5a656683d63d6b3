"""Twenty passages of real English, from books that are in the public domain."""

TEXTS = [
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do: once or twice she had peeped into the book her sister was reading, but it had "
    "no pictures or conversations in it.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a neighbourhood, this truth is well fixed.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age "
    "of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season of Light, it was the season of Darkness.",
    "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any "
    "other name. In his eyes she eclipses and predominates the whole of her sex. It was not that "
    "he felt any emotion akin to love for Irene Adler.",
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created equal. Now we "
    "are engaged in a great civil war.",
    "When in the Course of human events, it becomes necessary for one people to dissolve the "
    "political bands which have connected them with another, a decent respect to the opinions of "
    "mankind requires that they should declare the causes.",
    "You will rejoice to hear that no disaster has accompanied the commencement of an enterprise "
    "which you have regarded with such evil forebodings. I arrived here yesterday, and my first "
    "task is to assure my dear sister of my welfare.",
    "The Time Traveller, for so it will be convenient to speak of him, was expounding a recondite "
    "matter to us. His pale grey eyes shone and twinkled, and his usually pale face was flushed "
    "and animated. The fire burnt brightly.",
    "No one would have believed in the last years of the nineteenth century that this world was "
    "being watched keenly and closely by intelligences greater than man's and yet as mortal as his "
    "own; that as men busied themselves they were scrutinised and studied.",
    "Once upon a time there were four little Rabbits, and their names were Flopsy, Mopsy, "
    "Cotton-tail, and Peter. They lived with their Mother in a sand-bank, underneath the root of a "
    "very big fir-tree.",
    "The Mole had been working very hard all the morning, spring-cleaning his little home. First "
    "with brooms, then with dusters; then on ladders and steps and chairs, with a brush and a pail "
    "of whitewash.",
    "Squire Trelawney, Dr. Livesey, and the rest of these gentlemen having asked me to write down "
    "the whole particulars about Treasure Island, from the beginning to the end, keeping nothing "
    "back but the bearings of the island, I take up my pen.",
    "You don't know about me without you have read a book by the name of The Adventures of Tom "
    "Sawyer; but that ain't no matter. That book was made by Mr. Mark Twain, and he told the "
    "truth, mainly.",
    "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the "
    "distribution of the inhabitants of South America, and in the geological relations of the "
    "present to the past inhabitants of that continent.",
    "All happy families are alike; each unhappy family is unhappy in its own way. Everything was "
    "in confusion in the house. The wife had discovered that the husband was carrying on an "
    "intrigue with a French girl.",
    "We the People of the United States, in Order to form a more perfect Union, establish Justice, "
    "insure domestic Tranquility, provide for the common defence, promote the general Welfare, and "
    "secure the Blessings of Liberty to ourselves and our Posterity.",
    "My father's family name being Pirrip, and my Christian name Philip, my infant tongue could "
    "make of both names nothing longer or more explicit than Pip. So, I called myself Pip, and "
    "came to be called Pip.",
    "The annual labour of every nation is the fund which originally supplies it with all the "
    "necessaries and conveniences of life which it annually consumes, and which consist always "
    "either in the immediate produce of that labour, or in what is purchased.",
    "In the year 1872, the house in which Sheridan died in 1814 was inhabited by Phileas Fogg, one "
    "of the most noticeable members of the Reform Club, though he seemed always to avoid "
    "attracting attention; an enigmatical personage, about whom little was known.",
]
