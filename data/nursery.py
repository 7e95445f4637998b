"""The embedded corpus: an endless supply of small children's stories, so that the program runs with no network.

The stories follow the manner of Eldan & Li 2023, "TinyStories" (arXiv 2305.07759): words a young child knows, past
tense, short sentences, a small want or problem, a turn, a warm ending. The text is a seeded grammar. A story is a
plot from PLOTS, told beat by beat by one cast of characters, so the toy lost at the start is the toy found at the end.

To add a plot, add an entry to PLOTS: (title, who may star in it, text). The text has one item a line, and a line that
opens with a space goes on with the line before:
  slot / slot = value / value | value / value     a table private to the plot, of which a story draws one row
  A sentence. | Another way to tell it.           a beat: what happens next, with "|" between the alternatives
  ? A sentence.                                   a beat that is told half of the time
  --                                              a place for a paragraph break
"@NAME" stands for all the alternatives of the list NAME in SHARED.
Every slot {x} also comes as {X} (capital first letter) and {a_x} (with its article).
"""

import random

FIRST_NAMES = {
    "he": """Tom | Ben | Max | Sam | Tim | Jack | Leo | Finn | Noah | Oliver | Henry | Adam | Peter | Jacob | Luke |
        Theo | Danny | Billy | Joey | Owen | Ethan | Freddy | Hugo | Oscar | Toby | Nate | Eli | Ravi | Omar | Kenji""",
    "she": """Lily | Mia | Anna | Sue | Lucy | Emma | Ella | Sara | Amy | Molly | Zoe | Nora | Ruby | Kate | Jane | Ava
        | Ellie | Maya | Clara | Sophie | Tina | Hannah | Alice | Penny | Rosa | Polly | June | Leila | Yuki | Nina""",
}
PET_NAMES = {
    "he": """Pip | Bobo | Nutmeg | Rusty | Barney | Biscuit | Pepper | Bramble | Dusty | Fuzzy | Tuck | Rolo | Bumble |
        Scout | Wally | Chester | Milo | Otto | Coco | Button""",
    "she": """Tilly | Daisy | Honey | Poppy | Dot | Mimi | Clover | Hazel | Willow | Pearl | Ginger | Peaches | Bella |
        Maple | Luna | Olive | Cookie | Misty | Fern | Bonnie""",
}
TOY_NAMES = {
    "he": "Bolt | Rocket | Tick | Domino | Beep | Patch | Jingle | Bingo",
    "she": "Dolly | Bluebell | Twinkle | Ribbon | Tessa | Buttercup | Trixie | Spark",
}
KINDS = {
    "child": {"he": "boy", "she": "girl"},
    "tale": {"he": "prince | dragon | elf | wizard | pirate | knight",
             "she": "princess | dragon | fairy | elf | pirate | witch"},
    "toy": {"he": "robot | tin soldier | wooden puppet | toy clown | teddy bear",
            "she": "robot | rag doll | wooden doll | toy rabbit | toy dancer"},
}
ANIMALS = ("fox / Fox | bear / Bear | bunny / Bunny | mouse / Mouse | kitten / Cat | puppy / Dog | squirrel / Squirrel"
           "| hedgehog / Hedgehog | pig / Pig | lamb / Sheep | pony / Horse | goat / Goat | panda / Panda"
           "| monkey / Monkey | raccoon / Raccoon | badger / Badger | elephant / Elephant | tiger / Tiger"
           "| deer / Deer | donkey / Donkey | mole / Mole | lion / Lion")
ELDERS = {  # he or she / as others call the grown-up / as the hero does
    "child": """she / {his} mom / Mom | she / {his} mom / Mom | he / {his} dad / Dad | he / {his} dad / Dad | she /
        {his} grandma / Grandma | he / {his} grandpa / Grandpa""",
    "animal": """she / Mama {family} / Mama | he / Papa {family} / Papa | she / Grandma {family} / Grandma | he /
        Grandpa {family} / Grandpa""",
    "toy": """he / Mr. Wood / Mr. Wood | he / Mr. Green / Mr. Green | he / Mr. Finch / Mr. Finch | she / Mrs. Hill /
        Mrs. Hill | she / Miss Rose / Miss Rose | she / Mrs. Bell / Mrs. Bell""",
}
LANDS = {
    "child": """a little village by the sea | a small town near the mountains | a tiny house at the edge of a forest | a
        busy town | a yellow house by the river | a white house on a hill | a farmhouse near the woods | a village with
        a big clock | a house with a red door | a cottage with a blue door""",
    "animal": """a green forest | a quiet wood | a sunny meadow by a stream | a cozy den on a hill | a valley full of
        flowers | a warm home under an old oak tree | a forest by a blue lake | a field of tall grass | a snug little
        house of leaves | a village where all the animals were friends""",
    "tale": """a faraway land | a castle on a hill | a land of clouds and rainbows | a kingdom by the sea | a magic
        forest | a tower as tall as the trees | a stone house by a silver lake""",
    "toy": """a little toy shop | an old house with a red door | a shop full of toys | a dusty shop at the end of the
        street | a room above a bakery""",
}
LOOKS = {
    "child": "little | little | little | young | small", "animal": "little | little | small | tiny | young | baby",
    "tale": "little | young | small", "toy": "little | old | small | funny old",
}
TRAITS = ("kind | happy | cheerful | curious | gentle | friendly | clever | playful | lively | quiet | sweet | funny"
          "| smart | merry | polite | helpful | jolly | thoughtful | good")
# How often each group of heroes stars, out of twenty stories.
HEROES = {"child": 11, "animal": 6, "tale": 1, "toy": 2}
FRIEND_OF = {"child": "child", "animal": "animal", "tale": "animal", "toy": "child"}

# Drawn once for every story, whatever its plot.
COMMON = {
    "love": """sing and dance | tell funny jokes | look at the clouds | pick flowers | listen to stories | count the
        stars | play outside | climb on rocks | draw pictures | collect shiny stones | chase butterflies | help others |
        explore new places | make up songs | build little houses out of sticks | run in the grass""",
    "nature": "full of ideas | ready to help | kind to everyone | full of questions | in a good mood | full of energy",
    "happy": "very happy | so happy | so lucky | very glad | happy and proud",
    "wow": "Wow | Hooray | Oh my | Yay | Look at that",
    "treat": """hot soup and bread | warm cookies and milk | pancakes with honey | apple pie | sweet berries and cream |
        warm bread with jam | a big bowl of noodles | cheese and grapes""",
    "dream": """stars and clouds | flying over the hills | a boat on a quiet sea | all the fun to come | a land of candy
        | new adventures | soft clouds | a garden full of butterflies""",
    "game": "hide and seek | tag | catch | follow the leader | a guessing game | pirates",
}
DEARS = "dear | sweetie | little one | my dear"
# A plot's day opens with one of these, and with one of LATER where the story's first words have named the day.
DAYS = {
    "one_day": """one day | one day | one day | one morning | one afternoon | one Sunday | one Saturday | early one
        morning""",
    "fine_day": """one sunny day | one bright morning | one warm afternoon | one fine day | one summer day | one lovely
        morning | one day""",
    "one_night": "one night | one night | one dark night | late one night",
}
LATER = {
    "one_day": "later that day | that afternoon | a little later | after breakfast | soon after that",
    "fine_day": "later that day | that afternoon | a little later | after breakfast",
    "one_night": "that night | late that night",
}

ONCE_SHARE = 0.75
ONCE = """Once upon a time, there was {a_look} {kind} named {name}. | Once upon a time, there was {a_trait} {kind} named
  {name}. | Once upon a time, there was {a_trait} little {kind} named {name}. | Once upon a time, in {land}, there lived
  {a_trait} {kind} named {name}. | Once upon a time, {a_look} {kind} named {name} lived in {land}. | Once upon a time,
  there lived {a_look} {kind} named {name}. | Once upon a time, there was {a_look} {kind} whose name was {name}. | Once
  upon a time, there was {a_trait} {kind}. {His} name was {name}."""
OTHER = """There was once {a_look} {kind} named {name}. | There was once {a_trait} {kind} who lived in {land}. {His}
  name was {name}. | In {land}, there lived {a_look} {kind} named {name}. | Long ago, {a_trait} {kind} named {name}
  lived in {land}. | {name} was {a_look} {kind} who lived in {land}. | This is the story of {a_trait} {kind} named
  {name}. | In {land} lived {a_trait} little {kind}. Everyone called {him} {name}."""
TODAY = """One day, {a_look} {kind} named {name} woke up with a smile. {He} was {a_trait} {kind}. | One sunny morning,
  {a_look} {kind} named {name} jumped out of bed. | One day, {a_trait} {kind} named {name} got up very early. | It was a
  bright new day, and {a_look} {kind} named {name} was already awake. | One spring morning, {a_look} {kind} named {name}
  looked out of the window and smiled."""
HOME = """{He} lived in {land} with {his} family. | {His} home was in {land}. | {He} lived with {elder} in {land}."""
TOY_HOME = """{He} lived with {elder}, a kind toymaker. | An old toymaker called {elder} had made {him} with love. |
  {He} belonged to {elder}, who made toys. | {Elder}, the toymaker, took good care of {him}."""
HABIT = """{He} loved to {love}. | {name} loved to {love}. | Every day, {he} liked to {love}. | More than anything, {he}
  loved to {love}. | {He} was always {nature}, and {he} loved to {love}. | {He} liked to {love} all day long."""

SHARED = {
    "COLORS": "red | blue | green | yellow | orange | purple | pink | shiny | silver | golden | brown | white",
    "HUG": """It was the best day ever. | {name} never forgot that day. | And they all lived happily ever after. |
      {Elder} gave {him} a big, warm hug. | {Elder} kissed {him} on the head and said, "I am so proud of you." | {His}
      heart felt warm and full. | "I love you, {call}," said {name}, and {he} hugged {elder} tight. | {name} was the
      happiest {kind} in the whole world. | That night, {name} dreamed of {dream}. | {name} went to bed that night with
      a big smile on {his} face.""",
    "EVENING": """When the sun went down, {name} was tired but happy. | And that was the end of a very good day. | That
      evening, they had {treat}, and everyone was happy. | {name} talked about it all evening.""",
    "BOND": """{name} and {friend} were best friends from then on. | The two friends promised to always help each other.
      | {name} and {friend} hugged, and they stayed friends forever. | And they lived happily ever after. | After that
      day, {name} and {friend} did everything together. | {name} was {happy} to have a friend like {friend}.""",
    "PLAY": """The two friends laughed and played until the sun went down. | They could not wait to play again the next
      day. | {name} and {friend} walked home together, singing a happy song. | "Let us play again tomorrow!" said
      {friend}, and {name} said yes.""",
    "BED": """{He} closed {his} eyes and fell fast asleep. | Soon {name} was fast asleep, dreaming of {dream}. | "Good
      night, {dear}," whispered {elder}, and soon {name} was asleep. | {name} slept well until the sun came up. |
      {Elder} kissed {him} good night, and {name} slept like a baby. | {He} smiled, hugged {his} pillow, and went to
      sleep. | That night, {name} had the sweetest dreams.""",
}

PLOTS = (
    ("a lost toy", "child animal tale toy", """
color = @COLORS
toy = ball | drum | doll | toy car | toy boat | teddy bear | spinning top | train | puppet | horn | whistle | bell | toy
  horse | toy duck | ring | music box
place / spot = in the park / under a bench | in the park / behind a big tree | in the garden / between the roses | in
  the garden / inside a flower pot | by the river / in the tall grass | in the yard / under the steps | on the farm / on
  top of the hay | in the barn / behind a bucket | at the beach / behind a pile of sand | in the meadow / under some
  leaves | on the hill / next to a gray rock | in the field / near the gate
{He} had {a_color} {toy} that {he} loved very much. | {His} favorite thing in the whole world was {a_color} {toy}. |
  {Elder} had given {him} {a_color} {toy}, and {he} took it everywhere. | The best thing {he} had was {a_color} {toy}.
{Fine_day}, {name} was playing with it {place}. | {Fine_day}, {he} took the {toy} along to play {place}. | {Fine_day},
  {name} played {place} with the {toy} for a long time.
{He} stopped to look at a butterfly, and when {he} turned around, the {toy} was gone. | But when it was time to go home,
  the {toy} was gone! | Then {he} ran after a frog, and {he} forgot where {he} had put the {toy}.
? {name} looked here and {he} looked there, but {he} could not find it. | "Where did it go?" {he} said.
--
{name} ran to {elder} and began to cry. | {name} sat down and felt very sad. "What happened, {dear}?" asked {elder}. |
  "Why are you crying, {dear}?" asked {elder}.
? "I lost my {color} {toy}," {name} said. "I want it back." | "My {toy} is gone," {name} said in a small voice.
"Do not worry," said {elder}. "We will look for it together." | "Come," said {elder}. "Four eyes are better than two." |
  {Elder} gave {him} a hug. "Let us go back and look," {ehe} said.
? {His} friend {pal} came to help, too. | They looked high, and they looked low. | Step by step, they went back the same
  way.
--
And there it was, {spot}! | At last, {elder} pointed. There, {spot}, was the {color} {toy}!
"{Wow}! I found it!" {name} shouted. | {name} held the {toy} close and jumped up and down. | "Thank you for helping me!"
  said {name}.
? From then on, {name} always put the {toy} away with care. | "Next time, I will take better care of it," {he} said.
@HUG | @EVENING
"""),

    ("sharing", "child animal tale", """
tasty = big | sweet | tasty | yummy | warm | fresh
snack = cookie | sandwich | muffin | bun | pie | cupcake | pancake | cake | roll | honey cake | waffle
place / seat = to the park / on a bench | to the pond / on a flat stone | up the hill / under a tree | into the garden /
  on the soft grass | to the beach / on the warm sand | to the old bridge / on a log | to the meadow / among the flowers
gift = sweet cherries | ripe plums | crunchy nuts | red berries | green grapes | apples | honey drops
{Fine_day}, {elder} gave {him} {a_tasty} {snack}. | {Fine_day}, {elder} made {a_tasty} {snack} just for {him}.
? "Thank you, {call}!" said {name}. | It smelled so good! | {name} could not wait to eat it.
{name} took it {place} and sat down {seat}. | {name} walked {place} and found a nice spot {seat}.
Just then, {his} friend {pal} came along. | Before {he} could take a bite, {his} friend {pal} walked up.
"I forgot my lunch," {friend} said softly. | {friend} looked tired and hungry. | {friend} looked at the {snack} with big
  eyes. "That smells so good," {fhe} said. | "I am so hungry," said {friend}. "My tummy hurts."
--
{name} wanted to eat it all. | At first, {name} held the {snack} close. "It is mine," {he} thought. | {name} did not
  know what to do. There was only one {snack}.
But {he} saw how sad {friend} was. | But then {he} remembered what {elder} always said: "Food tastes better when you
  share it." | But then {he} thought about how it feels to be hungry.
So {name} broke the {snack} in two and gave one half to {friend}. | {name} cut the {snack} in two and gave {friend} the
  bigger half.
"Here, this is for you," {name} said. "Thank you!" said {friend}. | "One for you and one for me," said {name}. {friend}
  smiled. | "You are a true friend, {name}," said {friend}.
--
? They sat side by side and ate every bit of it. | They ate together and talked about many things.
? The next day, {friend} brought a bag of {gift} and shared them with {name}. | "Tomorrow I will bring {gift} for us
  both," said {friend}. | Then they played {game}.
? {name} learned that sharing makes everything better. | {name} had only half of the {snack}, but {he} had twice the
  fun.
@BOND | @PLAY
"""),

    ("afraid of the dark", "child animal tale", """
noise / source = tap, tap, tap / a branch that tapped on the window | scratch, scratch / a tiny beetle on the wall |
  whoo, whoo / an owl that sang in the tree | drip, drip, drip / the rain that fell into a bucket | creak, creak / the
  old gate that moved in the wind | swish, swish / dry leaves that blew on the roof | bump, bump / a loose door that
  swung in the wind
lamp = lamp | candle | lantern | light | jar of fireflies
night_light = star lamp | night light | moon lamp | paper lantern | soft toy
{name} was happy all day long, but {he} was afraid of the dark. | There was only one thing {name} did not like, and that
  was the dark. | {name} was brave all day, but at night {he} was afraid.
? At bedtime, {he} always hid under {his} blanket. | {He} liked to sleep with the door open.
{One_night}, {name} lay in bed and heard a noise. "{Noise}!" it went. | {One_night}, {he} woke up. "{Noise}!" went
  something in the dark. | {One_night}, {name} could not sleep. Then {he} heard a strange sound. "{Noise}!"
? {He} pulled the blanket over {his} head. | {name} sat up in bed and held {his} pillow tight.
"{Call}! {Call}!" {he} called. "There is a monster!" | "{Call}, please come!" {he} cried.
--
{Elder} came in with {a_lamp} and sat on the bed. | {Elder} hurried to {his} room with {a_lamp}.
"I heard something scary," {name} said. | "I am afraid of the dark," {name} whispered.
"Let us look together," said {elder}. | "Shall we find out what it is?" {elder} asked softly. | "Being brave means
  looking even when you are scared," said {elder}.
They went to look. It was only {source}! | Slowly, they looked out. It was not a monster at all. It was {source}. | They
  tiptoed out of bed. "Look," said {elder}. "It is just {source}."
? "Oh! That is not scary at all!" said {name}. | {name} felt a little silly, and then {he} laughed.
--
{Elder} put {a_night_light} next to {his} bed. | "The dark is like a soft blanket," said {elder}. "It helps the world to
  rest." | "See the stars?" said {elder}. "They only come out when it is dark." | {Elder} sang a soft song about the
  moon.
After that, {name} was not so scared of the night. | "Good night, dark," said {name}. "I am not afraid of you."
@BED
"""),

    ("a hurt bird", "child animal tale toy", """
bird = bird | robin | sparrow | bluebird | baby bird | blackbird | dove
where = under a bush | on the path | by the garden gate | under an old tree | next to a puddle | in the tall grass |
  near the well | at the foot of a wall
bed = box | basket | hat | bowl | shoe box
soft = soft grass | wool | dry leaves | an old sock | warm hay | a bit of cloth
bird_food = seeds | crumbs | berries | bits of bread | corn
{Fine_day}, {name} went out for a walk. | {Fine_day}, {name} was on {his} way to see a friend named {friend}.
? Then {he} heard a tiny sound. "Peep, peep!" | Suddenly, {he} heard a small cry. | "Peep!" said a tiny voice.
A little {bird} lay {where}. One wing was hurt. | There, {where}, sat a {bird} with a hurt wing. | {He} looked around
  and saw a {bird} {where}. The poor thing could not fly.
? "Do not be afraid," {name} said softly. "I will help you." | "Oh, you poor little {bird}!" said {name}.
--
{name} carried the {bird} home very gently. "{Call}, can we help?" {he} asked. | {name} picked up the {bird} and hurried
  home. "Look, {call}! This {bird} is hurt," {he} said.
"We can help, {dear}," said {elder}. "We must be very gentle." | "First the {bird} needs a warm bed," said {elder}. |
  {Elder} nodded. "You did the right thing, {dear}," {ehe} said.
{name} found {a_bed} and filled it with {soft}. | They put {soft} into {a_bed} to make a nest.
? {Elder} tied up the wing with a little bit of string. | {Elder} put a small bandage on the hurt wing.
Every day, {name} brought water and {bird_food}. | {name} gave the {bird} {bird_food} to eat, day after day. | Each
  morning, {name} fed the {bird} some {bird_food} and sang a soft song.
--
After many days, the {bird} was strong again. | One morning, the {bird} began to hop and sing.
? {name} was a little sad, but {he} knew it was time to say goodbye. | "It is time for you to fly," said {name}. |
  {name} opened the window. "You are free now," {he} said.
The {bird} flew up, up, up into the blue sky. | The {bird} flew around {him} once and then up over the trees. | With a
  happy song, the {bird} flew away.
? And every spring, the {bird} came back to say hello. | {name} learned that even small hearts can do big things. | From
  then on, a happy song woke {name} every morning.
@HUG
"""),

    ("planting a seed", "child animal tale toy", """
seed / plant = sunflower / tall yellow sunflower | pumpkin / big round pumpkin | apple / small apple tree | tomato / fat
  red tomato | strawberry / sweet red strawberry | rose / pretty pink rose | melon / huge green melon | daisy / bright
  white daisy | cherry / young cherry tree | carrot / long orange carrot | bean / tall green bean plant | tulip / lovely
  red tulip
spot = by the fence | behind the house | near the well | next to the wall | in a sunny corner | in a big clay pot |
  beside the path
{Fine_day}, {elder} gave {him} a tiny {seed} seed. | {Fine_day}, {name} found {a_seed} seed in an old box. | {Fine_day},
  a kind neighbor gave {name} one small {seed} seed.
? "What can it do?" asked {name}. "It will grow if you take care of it," said {elder}. | "It is so small!" said {name}.
  "Just wait," said {elder}. "Small things can grow big."
{name} dug a hole {spot} and put the seed inside. | {name} planted the seed {spot} and covered it with dirt. | So {name}
  made a little hole {spot} and dropped the seed in.
? {He} gave it some water and sat down to wait. | Then {he} poured water on it. "Grow, little seed!" {he} said. | "Sleep
  well, little seed," {he} said, and {he} gave it a drink.
--
The next day, {name} ran out to look. There was nothing. | {name} looked every morning, but nothing came up. | Days went
  by, and there was only brown dirt.
? "Maybe the seed is broken," {name} said. | {His} friend {pal} laughed and said, "Nothing will grow there!"
"Good things take time," said {elder}. | "Be patient, {dear}," said {elder}. "The seed is working under the ground." |
  {Elder} smiled. "Keep on giving it water and love," {ehe} said.
{name} did not give up. {He} even sang to the seed. | So {name} waited. The rain fell, and the sun shone.
--
Then one morning, {he} saw a tiny green leaf. | At last, a little green shoot came out of the dirt. | And then, one day,
  something small and green was there!
? "{Wow}! It is growing!" shouted {name}. | "{Call}, come and see!" {he} called. | {name} danced all around it.
It grew and grew until it was {a_plant}. | Week after week it grew, until {name} had {a_plant}.
? "You did it," said {elder}. "You were so patient." | {name} learned that good things come to those who wait. | {name}
  was glad that {he} did not give up. | {name} saved some new seeds for the next year.
@HUG
"""),

    ("baking", "child animal tale toy", """
cake / filling = chocolate cake / cocoa | apple pie / apples | carrot cake / carrots | honey cake / honey | berry pie /
  berries | pumpkin pie / pumpkin | lemon cake / lemon juice | cherry pie / cherries | nut cake / nuts | banana cake /
  bananas | plum cake / plums | cheese cake / soft cheese
reason = for the town fair | for a sick neighbor | for a big party | for the whole family | to say thank you to a friend
  | for the new neighbors | for the spring picnic
{One_day}, {name} wanted to bake {a_cake} {reason}. | {One_day}, {name} had an idea. {He} would bake {a_cake} {reason}.
  | {One_day}, {name} and {elder} wanted to make {a_cake} {reason}.
? "Can you help me, {call}?" {he} asked. "Of course," said {elder}. | "I will do the stirring!" said {name}. | "Let us
  begin," said {elder}, and {name} clapped.
They put flour, eggs, and sugar into a big bowl. | First they washed up. Then they took out a bowl and a big spoon.
Next they added {filling}. | {name} put in the {filling} and stirred it round and round. | {name} tasted the {filling}.
  "Yum!" {he} said.
--
But {name} was in a hurry, and {he} dropped an egg. It went splat on the floor. | But then {name} slipped and spilled
  the milk all over the table. | Then a cloud of flour flew up and made everything white, even {his} nose. | Suddenly,
  the bag of sugar fell down with a loud thump.
? "Oh no, look at this mess!" cried {name}. | "I am sorry," {name} said. "Now it is all wrong." | {name} wanted to cry.
{Elder} only laughed. "Everyone makes a mess sometimes," {ehe} said. | "Do not be sad," said {elder}. "We can fix it."
They wiped it all up and tried again. | {name} got a cloth, and soon the kitchen was clean again.
--
The {cake} went into the hot oven. | {Elder} put the {cake} into the oven, and {name} waited. | They put the {cake} into
  the oven and sang a song while they waited.
Soon a sweet smell filled the house. | "Is it done yet?" {name} asked again and again. At last, it was. | "Ding!" went
  the little bell. It was ready!
? {friend}, who lived close by, came to the door. "What smells so good?" {fhe} asked. | It was a bit flat on one side,
  but {name} did not mind.
"This is the best {cake} I have ever had!" said {elder}. | Everyone loved it, and not a crumb was left.
? {name} learned that it is all right to make mistakes. | "We made it together," said {name}. "That is why it is so
  good."
@HUG
"""),

    ("a storm", "child animal tale", """
hide = under the table | under the bed | behind the big chair | under a blanket | in the corner | behind the curtain
calm = count slowly after each flash | sing a loud song | tell a funny story | make shadow animals on the wall | drum
  along with the thunder | build a tent out of blankets
{One_day}, big dark clouds came over the hills. | {One_day}, the sky turned gray, and the wind began to blow. |
  {One_day}, {name} was playing when the sky grew dark.
? "I think it is going to rain," said {elder}. "Come inside." | {name} felt a cold drop on {his} nose.
? Soon the rain came down hard. | Rain beat on the roof. | The wind shook the trees, and the rain fell and fell.
Then there was a bright flash and a loud boom! | "Boom!" went the thunder. | There was a flash of light. "Boom! Crash!"
{name} was so scared that {he} ran inside and hid {hide}. | {name} jumped and ran into the house to hide {hide}.
--
{Elder} came to find {him}. "I am here," {ehe} said. | {Elder} sat down close by. "You are safe with me," {ehe} said. |
  "Come here, {dear}," said {elder}. "A storm is only noise and water."
"I do not like the thunder," said {name}. | "It is so loud," {name} whispered. | "Is the sky angry?" asked {name}.
"The clouds are just bumping into each other," said {elder}. | "The thunder cannot hurt us in here," said {elder}. | "It
  is only the sky playing a big drum," {elder} said with a smile.
"Let us {calm}. It will help." So that is what they did. | "When I am scared, I like to {calm}." So they did it
  together. | Then {ehe} had an idea. "We can {calm}!" Soon {name} was having fun.
? "Boom!" said the storm. "Boom!" said {name}, and {he} laughed. | Each boom sounded a little less scary than the last.
--
Little by little, the thunder became soft. | Then the rain stopped, and the sun came out.
{name} ran to the window. There was a rainbow in the sky! | Outside, everything was wet and shiny, and a rainbow stood
  over the hill. | "Look!" said {name}. "A rainbow!"
? "I was brave," said {name}. "Yes, you were," said {elder}. | The next time it thundered, {name} was not afraid. |
  {name} learned that storms always go away.
@HUG
"""),

    ("learning to swim", "child animal", """
water = lake | pond | river | pool | sea
float = log | tube | board | ring | big leaf
All of {his} friends could swim, but {name} could not. | {name} wanted to learn how to swim. | There was one thing
  {name} could not do. {He} could not swim.
{Fine_day}, {elder} took {him} to the {water}. | {Fine_day}, {name} went to the {water} with {elder}.
{His} friend {pal} was splashing in the water. "Come in!" called {friend}. | There they saw {his} friend {pal}. "Jump
  in, {name}!" shouted {friend}. "It is not cold."
? {name} put one toe in and jumped back. | But {name} stood on the shore and shook. | "It is too deep," said {name}. "I
  am scared."
--
"You do not have to go far," said {elder}. "I will hold you." | "One small step at a time," said {elder}. | "I was
  afraid once, too," said {elder}. "I will help you."
So {name} went in, step by step, until the water touched {his} tummy. | {name} took a deep breath and walked in.
First {he} learned to blow bubbles. "Blub, blub, blub!" | {friend} gave {him} {a_float} to hold, and {he} began to kick.
  | {Elder} held {him} up while {he} kicked and kicked.
? Water got into {his} nose, and {he} coughed. "I cannot do it!" {he} said. | Splash! {He} went under for a moment, but
  {elder} was right there.
? "Try once more," said {friend}. "You are almost there." | "You can do it, {name}!" said {friend}.
--
{name} kicked as hard as {he} could. Then, all at once, {he} was swimming! | {name} tried again and again, and suddenly
  {he} was moving through the water all by {himself}! | One kick, two kicks, three kicks, and {name} did not sink. {He}
  was swimming!
? "Look at me! I can swim!" {he} shouted. | "I am a fish!" {name} said, and everyone laughed.
? {Elder} clapped and cheered. | {friend} swam next to {him} all the way. | They splashed and played until it was time
  to go.
? {name} learned that brave means trying even when you are scared. | "Tomorrow I will swim even farther," said {name}.
@HUG | @EVENING | @PLAY
"""),

    ("a found key", "child animal tale toy", """
look_of = small golden | rusty | tiny silver | big iron | strange old | shiny | little green
found = under a stone | in the sand | under the rug | in the grass | inside an old boot | at the bottom of a drawer |
  under a loose board | in a hollow tree
wrong = the front door | the kitchen cupboard | the garden gate | the cellar door | the old clock | the big drawer
lock / inside = an old chest in the shed / a pile of picture books | a little green door in the garden wall / a secret
  garden full of roses | a dusty box on the shelf / a music box that played a sweet song | a trunk under the stairs /
  bright clothes for dressing up | a tiny door in a tree / a cozy room with two little chairs | a wooden box in the
  attic / a letter and an old family picture | a blue box behind the books / paints of every color | a small house in
  the garden / toys from long ago
{One_day}, {he} found {a_look_of} key {found}. | {One_day}, {name} saw something {found}. It was {a_look_of} key! |
  {One_day}, {name} was looking for bugs. {Found}, {he} found {a_look_of} key.
"What does it open?" {he} wondered. | "This must open something special," said {name}.
? First, {he} tried {wrong}. The key was too big. | {He} ran to {wrong}, but the key did not fit. | {He} tried to open
  {wrong}, but nothing happened.
--
{name} went to see {his} friend {pal}. | {name} asked {his} friend {pal} to help.
? "I have a key, but I do not know what it opens," said {name}. | "Will you help me find the lock?" asked {name}.
"A mystery!" said {friend}. "I love those." | "Let us look together," said {friend}. | "Oh, this is fun!" said {friend}.
They looked up, down, and all around. | They looked for a long time. | They searched and searched until they were tired.
? "I think we should give up," said {friend}. "No, just one more," said {name}.
Then {friend} saw {lock}. | At last, they found {lock}. | Just before supper, {name} saw {lock}.
--
With a beating heart, {name} turned the key. Click! | "Try it!" said {friend}. {name} turned the key. Click!
It opened slowly, and they found {inside}. | And what did they see? They saw {inside}!
? "{Wow}!" said {friend}. | "It is like a treasure!" said {name}. | "This is better than gold," said {friend}.
? {Elder} came to see. "I have looked for that key for years!" {ehe} said. | It was their special secret. | From then
  on, {name} kept the key on a string around {his} neck. | {name} learned that it pays to keep trying.
@BOND | @PLAY
"""),

    ("telling the truth", "child animal tale toy", """
color = @COLORS
vase = vase | cup | lamp | bowl | plate | jar | teapot | clock | mirror | flower pot
play = playing with a ball | jumping like a frog | dancing round and round | chasing a fly | marching like a soldier |
  spinning like a top | pretending to be a plane
hid = behind the curtain | under the rug | in a box | under the bed | behind the door
blame = the wind | a bird | a goose | the rain | a fly
{Elder} had {a_color} {vase} that {ehe} loved. | There was {a_color} {vase} on the table. It was very special to
  {elder}.
{One_day}, {name} was {play} inside the house. | {One_day}, it was raining, so {name} was {play} in the house.
Bump! {He} hit the table, and the {vase} fell down. | {He} bumped into the table. Crash! The {vase} fell and broke.
? Now it was in pieces. | "Oh no!" {name} whispered.
--
{name} was scared. {He} hid the pieces {hid}. | {He} did not know what to do, so {he} put the pieces {hid}.
? "I will say it was {blame}," {he} thought. | {He} hoped that no one would ask.
Soon {elder} came in. "Where is my {vase}?" {ehe} asked. | When {elder} came home, {ehe} looked around. "Do you know
  where my {vase} is?" {ehe} asked.
"It was {blame}," said {name}. But the lie made {him} feel even worse. | {name} said nothing for a long time. | {name}
  looked at the floor. {His} face turned red.
--
Then {name} could not keep it in. "I broke it," {he} said. "I am sorry." | At last, {he} told the truth. "It was me. I
  broke it, and I am very sorry." | "{Call}, I have to tell you something," {he} said. "I broke it."
{Elder} was quiet. Then {ehe} gave {him} a hug. | {Elder} was sad about the {vase}, but {ehe} was glad to hear the
  truth. | {Elder} looked at {him} kindly.
"Thank you for telling the truth," {ehe} said. "That was very brave." | "A {vase} can be fixed," {ehe} said. "The truth
  matters more." | "It takes courage to tell the truth," {ehe} said.
They got some glue and fixed the {vase} together. | Together they put the pieces back, one by one. | The next day,
  {name} worked hard and helped {elder} to fix it.
{name} felt much better. | {name} learned that telling the truth is always best. | From then on, {name} always told the
  truth. | {name} felt as light as a feather.
@HUG
"""),

    ("a race", "child animal", """
from / goal = the old gate / the tall oak tree | the bridge / the red barn | the pond / the top of the hill | the well /
  the stone wall | the big rock / the end of the field | the mill / the river
prize = golden cup | blue ribbon | basket of apples | big cake | shiny medal | crown of flowers | jar of honey
trip = a root | a stone | a branch | a hole | the long grass
{name} could run very fast. | {name} loved to run more than anything. | {name} was proud of how fast {he} could run.
{Fine_day}, there was a big race from {from} to {goal}. | {Fine_day}, everyone came to see the great race. It went from
  {from} to {goal}.
? The winner would get {a_prize}. | The prize was {a_prize}.
{His} friend {pal} was in the race, too. | {name} stood next to {his} friend {pal}.
? "I am going to win," said {name}. | "Good luck," said {friend}. "Good luck to you, too," said {name}.
--
"Ready, set, go!" called {elder}. | "One, two, three, go!" shouted {elder}. And off they went! | {Elder} waved a flag,
  and the race began.
{name} ran like the wind. | They ran and ran. {name} was first, and {friend} was close behind.
Then {name} heard a cry. {friend} had tripped over {trip}. | Suddenly, {friend} tripped over {trip} and fell down. | But
  {friend} did not see {trip}, and down {fhe} went.
? "Ouch! My foot!" cried {friend}. | "Oh, my leg hurts!" said {friend}. | {friend} sat on the ground and cried.
--
{name} wanted to win. But {friend} was hurt, so {he} stopped and ran back. | {name} was almost at the end, but {he}
  turned around at once. | "A friend is better than a prize," {name} thought, and {he} turned around.
"Lean on me," said {name}. "We will finish together." | "I will help you," said {name}. "Come on, we can walk."
They came in last, but they came in together. | Step by step, the two friends came to {goal}.
? Everyone stood up and clapped for them. | {Elder} had tears of joy in {ehis} eyes.
? {name} learned that being kind is better than winning. | "You are the best friend in the world," said {friend}. |
  {name} did not win, but {he} felt like a winner.
@BOND
"""),

    ("a new friend", "child animal", """
spot = in the sandbox | by the fence | under a big tree | on the swing | near the pond | on the steps | by the bridge
item = picture book | kite | bag of marbles | paper boat | jump rope | toy train | yellow balloon | big ball
made = a castle of sand and stones | a house out of sticks | a long chain of flowers | a tower as tall as they were | a
  boat out of an old box | a tent out of a blanket | a road for the ants
{name} did not have anyone to play with. | {name} was often lonely. No one lived close by. | {name} had many toys, but
  no one to play with.
? "I wish I had a friend," {he} told {elder}. "You will find one," said {elder}. | Every night, {he} looked at a star
  and wished for a friend.
{Fine_day}, {name} went outside and saw someone new {spot}. | {Fine_day}, {he} saw {a_fkind} sitting all alone {spot}. |
  {Fine_day}, a new family moved in nearby. {name} saw {a_fkind} {spot}.
{name} wanted to say hello, but {he} was shy. | "What if no one likes me?" {name} thought.
--
At last, {name} walked over. "Hello, I am {name}," {he} said. | {name} took a deep breath. "Hi, my name is {name}. What
  is your name?"
"I am {friend}," said the little {fkind}. "I am new here." | "My name is {friend}," said the {fkind} in a soft voice. "I
  do not know anyone."
"Do you want to play with me?" asked {name}. | "I have {a_item}," said {name}. "We can share it." | {name} held out
  {a_item}. "Would you like to play?" {he} asked.
? {friend} jumped up. "I would love to!" {fhe} said. | "Oh, yes!" said {friend}, and {fhis} eyes were bright.
--
They played {game}. Then they made {made}. | First they made {made}. Then they played {game}. | For hours, they played
  {game} and laughed.
? Once, they both wanted to go first. "You go first," said {name}. "No, you go first," said {friend}, and they laughed.
? When they got hungry, {elder} brought them {treat}. | {friend} liked the same things as {name}, even {treat}. | "Come
  and eat!" called {elder}, and they shared {treat}.
? "I was shy, too," said {friend}. "I am so glad you came." | {name} learned that one little word, hello, can start
  something big. | {name} was not lonely anymore. | {His} wish had come true.
@BOND | @PLAY
"""),

    ("a birthday surprise", "child animal tale toy", """
gift = red kite | drum | blue scarf | big book | toy ship | paint box | wooden flute | bag of marbles | soft blanket |
  star lamp | silver bell | straw hat
busy = too busy | very busy today | in a hurry | a little tired
deco = balloons | paper stars | flowers | little lights | ribbons | colorful flags
At last, the big day was here. It was {his} birthday, and {name} was very excited. | It was a special day. It was {his}
  birthday! | {name} had waited a long time for {his} birthday, and now it was here.
{name} ran to {elder}. "Do you know what day it is?" {he} asked. | "Good morning, {call}! Guess what day it is!" said
  {name}.
"It is a day like any other," said {elder}. "I am {busy}." | "Is it laundry day?" asked {elder}. "I am {busy}, {dear}."
Then {name} went to see {his} friend {pal}. | So {name} went to find {his} friend {pal}.
"Not now," said {friend}. "I cannot play." | "Sorry, I have to go," said {friend}, and {fhe} hid something behind {fhis}
  back.
--
{name} sat down all alone. "They all forgot," {he} said. | {name} walked slowly down the path. {His} heart was heavy. |
  A tear rolled down {his} cheek. "Nobody remembers me," {he} thought.
When the sun was low, {name} went home. It was very dark and quiet inside. | At last, {he} went back home. All the
  lights were out.
{He} opened the door. "Surprise!" everyone shouted. | {He} took one step inside, and then the lights came on.
  "Surprise!"
--
The room was full of {deco}. | There were {deco} everywhere, and a big cake on the table.
? "Did you think we forgot?" asked {elder}. "Never!" | "We were all getting ready for your party," said {friend}. |
  "Happy birthday, {name}!" they all sang.
{friend} gave {him} {a_gift}. | {Elder} gave {him} a box. Inside was {a_gift}. | There was a present, too. It was
  {a_gift}!
? "{Wow}! It is just what I wanted!" said {name}. | {name} laughed and cried at the same time.
? They played {game} and danced until late. | {name} closed {his} eyes, made a wish, and blew out the candles. | "The
  best present is having you all here," said {name}.
@HUG
"""),

    ("rain puddles", "child animal", """
color = @COLORS
coat = coat | raincoat | hat
sail = paper boat | leaf boat | little stick boat | walnut boat
creature = frog | duck | snail | worm | toad
{One_day}, it rained and rained. | {One_day}, the rain fell on the roof. "Pitter, patter, pitter, patter." | {One_day},
  {name} wanted to go out and play, but it was raining.
? {name} looked out of the window and felt sad. | "I do not like the rain," said {name}. "It spoils everything."
{Elder} smiled. "Rain can be fun, too," {ehe} said. | "Have you ever jumped in a puddle?" asked {elder}. | "Rain makes
  puddles," said {elder}, "and puddles are made for jumping."
So {name} put on {color} boots and {a_coat}. | {Elder} gave {him} {color} boots and {a_coat}.
--
Outside, there were puddles everywhere. | They went out and found a huge puddle by the gate. | Out they went, into the
  wet, shiny world.
{name} put one foot into a puddle. Splash! | Splash! {name} jumped right into the middle of it.
? "{Wow}! Look how high the water goes!" {he} shouted. | Water flew up and got {elder} wet, and they both laughed.
Then {his} friend {pal} came out to play. | Soon {his} friend {pal} came to splash, too.
"Let us make {a_sail}!" said {friend}, and they did. | {name} jumped, and {friend} jumped, and everyone got wet.
? A happy {creature} sat by the water and watched them. | "Look, a {creature}!" said {friend}. "Hello, {creature}!" |
  {friend} slipped and sat down in the mud, and they both laughed and laughed.
--
When they were cold, {elder} called them in. | At last, {elder} called, "Time to come in!"
{Elder} dried them with a big towel and gave them {treat}. | They had a warm bath and then {treat}. | {Elder} laughed.
  "I see two little mud cakes!" {ehe} said.
? {name} learned that there is fun in every kind of day. | Now {name} loved the rain. | From then on, {name} smiled at
  every gray cloud. | "I hope it rains again tomorrow," said {name}.
@HUG | @BOND
"""),

    ("a missing hat", "child animal tale toy", """
color = @COLORS
hat = hat | cap | scarf | straw hat | wool hat | bonnet
past = over the fence | across the field | over the roof | down the road | past the well | over the trees
guest / doing = mother bird / sitting in it, with three tiny eggs | sleepy frog / taking a nap in it | family of ducks /
  sleeping in it, all in a row | small turtle / resting in it | baby owl / hiding in it from the sun | little duck /
  sitting in it like a boat | mother hen / sitting in it, with one tiny chick
where = behind a bush | on a pile of hay | next to a log | in the tall grass | by the stream | near a hollow tree
ask = old goose | farmer | baker | big brown horse | sleepy cow | tall stork
{name} had {a_color} {hat} that {elder} had made for {him}. | {name} always wore {a_color} {hat}. {Elder} had made it. |
  {His} {color} {hat} was {his} favorite. {Elder} had made it for {him}.
{One_day}, a strong wind began to blow. | {One_day}, {name} went for a walk, and the wind blew hard. | {One_day}, the
  wind came rushing down the hill.
Whoosh! It took the {hat} and blew it away. | "Whoosh!" said the wind, and the {hat} flew off.
"Come back!" cried {name}, but the {hat} flew {past}. | {name} ran after it, but it flew {past} and was gone.
--
{name} walked and walked and looked for the {hat}. {He} met {a_ask}. | {name} looked everywhere for it. Then {he} met
  {a_ask}.
"Have you seen my {hat}?" {he} asked. | "Did you see {a_color} {hat}?" {he} asked.
"No," said the {ask}, "but the wind blew that way." | "I saw something {color} fly by," said the {ask}. | "Go on a
  little more," said the {ask}. "You may find it."
At last, {he} saw something {color} {where}. It was the {hat}! | So {name} went on, and there it was, {where}!
--
But the {hat} was not empty. There was {a_guest}, {doing}. | But someone had found it first. It was {a_guest}, {doing}.
? "Oh!" whispered {name}. | {name} stood very still and smiled. | "How sweet!" {name} said softly.
{name} did not want to spoil such a nice home. | "You need it more than I do," said {name}. | "You can keep it," {name}
  whispered. "It makes a good bed."
So {he} went home and told {elder} all about it. | {He} walked home with a cold head and a warm heart. "I gave my {hat}
  away," {he} told {elder}.
"That was very kind," said {elder}. "I will make you a new one." | {Elder} hugged {him}. "Then it is time to make
  another {hat}," {ehe} said.
? Soon {name} had a new {hat}, and it was even nicer than the old one. | The next day, there was a new {color} {hat} on
  {his} bed. | {name} learned that giving can make you happier than keeping.
@HUG
"""),
)


def split(text):
    """The alternatives of `text`, which are parted by "|"."""
    return [part.strip() for part in " ".join(text.split()).split("|")]


def forms(slots):
    """The slots with their capital and article forms: {"toy": "ball"} gains {"Toy": "Ball", "a_toy": "a ball"}."""
    out = {}
    for slot, value in slots.items():
        article = "an " if value[0] in "aeiou" else "a "
        out |= {slot: value, "a_" + slot: article + value}
        out[slot[0].upper() + slot[1:]] = value[0].upper() + value[1:]
    return out


def tables(picks):
    """For each entry {"slot / slot": rows} of `picks`, the rows as dicts of slot forms."""
    return [[forms(dict(zip(slots.split(" / "), row.split(" / "), strict=True))) for row in alternatives(rows)]
            for slots, rows in picks.items()]


def pronouns(he, prefix=""):
    """The pronoun slots of a character who is "he" or "she"."""
    him, his = {"he": ("him", "his"), "she": ("her", "her")}[he]
    return forms({prefix + "he": he, prefix + "him": him, prefix + "his": his, prefix + "himself": him + "self"})


def roles(group, he):
    """What a hero of `group` who is "he" or "she" may be: pairs of the kind's slots and the grown-ups of that kind."""
    kinds = split(ANIMALS) if group == "animal" else split(KINDS[group][he])
    out = []
    for kind, family in (row.split(" / ") if " / " in row else (row, "") for row in kinds):
        elders = ELDERS.get(group, ELDERS["child"]).format(family=family, **pronouns(he))
        rows = [row.split(" / ") for row in split(elders)]
        out.append((forms({"kind": kind}), [forms({"elder": elder, "call": call}) | pronouns(she, "e")
                                            for she, elder, call in rows]))
    return out


def alternatives(text):
    """The alternatives of `text`, with "@NAME" spelled out; half of them blank if it opens with "?"."""
    out = []
    for part in split(text.removeprefix("?")):
        out += split(SHARED[part[1:]]) if part.startswith("@") else [part]
    return out + [""] * len(out) if text.startswith("?") else out


def parse(who, text):
    """A plot made ready to tell: its stars (as often as they star), its tables, its beats (None: a paragraph break)."""
    lines = text.strip().replace("\n ", " ").split("\n")
    picks = dict(line.split(" = ") for line in lines if " = " in line)
    beats = [None if line == "--" else alternatives(line) for line in lines if " = " not in line]
    return [group for group in who.split() for _ in range(HEROES[group])], tables(picks), beats


NAMES = {"child": FIRST_NAMES, "animal": PET_NAMES, "tale": FIRST_NAMES, "toy": TOY_NAMES}
CAST = {group: {he: (split(names[he]), roles(group, he), pronouns(he), pronouns(he, "f")) for he in ("he", "she")}
        for group, names in NAMES.items()}
SETTING = {group: tables({"look": LOOKS[group], "trait": TRAITS, "land": LANDS[group]} | COMMON) for group in NAMES}
TIMES = tables(DAYS), tables(LATER)
OPENINGS = split(ONCE), split(OTHER), split(TODAY)
HOMES = {group: split(TOY_HOME) if group == "toy" else split(HOME) for group in NAMES}
HABITS, DEAR = split(HABIT), split(DEARS)
SCRIPTS = [parse(who, text) for _, who, text in PLOTS]


def story(index, seed=0):
    """Story number `index` of the endless corpus `seed`: the same text on every machine and Python version.

    Only Random.random is drawn from, since Python promises its values, and not those of choice(), between versions.
    """
    # One odd multiplication keeps near seeds and indices apart: Mersenne Twister keys of several words may collide.
    draw = random.Random((seed * 2654435761 + index) * 0x9E3779B97F4A7C15 % 2**64).random

    def pick(options):
        return options[int(draw() * len(options))]

    groups, picks, beats = pick(SCRIPTS)
    group = pick(groups)
    names, kinds, hero, _ = CAST[group]["he" if draw() < 0.5 else "she"]
    name, (kind, elders) = pick(names), pick(kinds)
    friends, friend_kinds, _, friend = CAST[FRIEND_OF[group]]["he" if draw() < 0.5 else "she"]
    pal, fkind = pick(friends), pick(friend_kinds)[0]["kind"]
    while pal == name or group == "animal" and fkind == kind["kind"]:
        pal, fkind = pick(friends), pick(friend_kinds)[0]["kind"]
    cast = {"name": name, "Name": name, "friend": pal, "pal": pal if fkind in ("boy", "girl") else f"{pal} the {fkind}",
            "fkind": fkind, "a_fkind": ("an " if fkind[0] in "aeiou" else "a ") + fkind,
            "dear": name if draw() < 0.4 else pick(DEAR), **hero, **friend, **kind, **pick(elders)}

    once, today = draw() < ONCE_SHARE, draw() < 0.5
    opening = pick(OPENINGS[0 if once else 2 if today else 1])
    for rows in SETTING[group] + TIMES[today and not once] + picks:
        cast.update(pick(rows))
    text = [opening]
    if group == "toy" or draw() < 0.3 and "{land}" not in opening and (once or not today):
        text.append(pick(HOMES[group]))
    if draw() < 0.4:
        text.append(pick(HABITS))
    paragraphs = draw() < 0.5
    for beat in beats:
        if beat is None:
            if paragraphs and draw() < 0.8:
                text.append("\n\n")
        elif line := pick(beat):
            text.append(line)
    return " ".join(text).replace(" \n\n ", "\n\n").format_map(cast)


def stories(n, seed=0):
    """The first `n` stories of the corpus `seed`, one by one."""
    for index in range(n):
        yield story(index, seed)
