"""The vocabulary of the synthetic corpus: word lists and small tables of facts, all written for this model."""

from zlib import crc32

ANIMALS = """ant ape badger bat bear beaver bee bird bison buffalo bull butterfly camel cat cheetah chicken cow crab crow
deer dog dolphin donkey dove dragonfly duck eagle elephant elk falcon ferret fish fly fox frog gecko giraffe goat goose gorilla
hamster hare hawk hedgehog hen heron hippo horse jackal jaguar kangaroo kitten koala lamb leopard lion lizard llama lobster lynx
mole monkey moose moth mouse mule newt octopus orca ostrich otter owl ox panda panther parrot peacock pelican penguin pig pigeon
pony puppy python rabbit raccoon rat raven robin salmon seal shark sheep shrimp skunk sloth snail snake sparrow spider squid
squirrel stork swan tiger toad trout turkey turtle viper vulture walrus wasp whale wolf wombat worm yak zebra""".split()

COLOURS = """red blue green yellow orange purple pink brown black white grey silver golden violet crimson turquoise beige
scarlet amber olive""".split()

FOODS = """apple apricot avocado bacon bagel banana bean beef berry biscuit bread broccoli butter cabbage cake candy carrot
celery cheese cherry chili chocolate coconut cookie corn cracker cream cucumber curry egg fig flour garlic ginger grape ham
honey jam jelly kiwi lemon lentil lettuce lime mango melon milk muffin mushroom mustard noodle nut oat olive onion orange
pancake papaya parsley pasta pastry pea peach peanut pear pepper pickle pie pizza plum popcorn potato pudding pumpkin radish
raisin rice salad salt sandwich sauce sausage soup spinach steak stew strawberry sugar syrup toast tofu tomato turnip vanilla
waffle walnut yogurt""".split()

DRINKS = "water tea coffee milk juice lemonade cocoa soda".split()

THINGS = """anchor apron arrow axe bag ball balloon banner barrel basket bath battery bed bell belt bench bicycle blanket boat
book boot bottle bowl box bracelet brick bridge broom brush bucket button cabin cable camera candle canvas cap card carpet cart
castle ceiling chain chair chalk clock cloth coat coin comb compass cup curtain desk diary dish doll door dress drum engine fan
feather fence flag flute fork frame garage gate glass glove guitar hammer hat helmet hook jacket jar jug kettle key kite knife
ladder lamp lantern letter lock magnet map marble mask match mirror mitten mug nail necklace needle net notebook oven paddle
paint pan paper pen pencil phone piano picture pillow pin pipe plate pocket pot purse puzzle radio rail ribbon ring robot rocket
roof rope rug saddle scarf scissors screw shelf shell ship shirt shoe shovel sign sink sled soap sock sofa spade spoon stamp
stool stove string suitcase sweater swing sword table tape teapot telephone tent thread ticket tie tool towel toy train tray
truck trumpet umbrella vase vest violin wagon wallet watch wheel whistle window wire wood zipper""".split()

PLACES = """airport attic bakery bank barn beach cafe cave church cinema city coast desert farm field forest garden harbour
hill hospital hotel house island jungle kitchen lake library market meadow mountain museum office orchard palace park pond port
river road school shop stadium station street temple theatre tower town valley village zoo""".split()

NATURE = """autumn breeze cloud dawn dusk earth fire flood flower fog forest frost grass hail ice leaf lightning moon mud night
ocean petal planet plant rain rainbow rock root sand sea seed shadow sky snow soil spring star stone storm stream summer sun
sunset thunder tree wave weather wind winter""".split()

PEOPLE = """actor artist aunt baby baker boy brother captain carpenter chef child clown cook cousin dancer daughter dentist
doctor driver farmer father fisher friend gardener girl grandmother guard guest hunter judge king knight lawyer miller mother
nurse painter pilot pirate poet police prince princess queen sailor scientist singer sister soldier son student tailor teacher
uncle waiter wizard worker writer""".split()

VERBS = """answer arrive ask bake begin borrow bring build buy call carry catch change choose clean climb close collect count
cover cross dance deliver dig discover draw dream drink drive drop eat enjoy enter explain explore fall feed feel fight fill
find finish fix float fold follow forget gather give grow guess happen hear help hide hold hope hurry invite join jump keep kick
knock know laugh learn leave lend lift listen live look lose love make measure meet mend mix move need notice offer open order
pack paint pick plan play pour practice promise pull push read remember repair rest return ride roll run search sell send share
shine shout sing sit skate sleep slide smell smile speak spend spill stand start stay stop swim take talk taste teach tell thank
think throw touch travel try turn understand visit wait wake walk wash watch wear whisper win wonder work write yell""".split()

ADJECTIVES = """able angry awake bitter bold brave bright broken busy calm careful cheap cheerful clean clear clever cold common
cool crazy curious dark deep different dirty dry dull eager early easy empty fair famous fancy fast fat fierce flat free fresh
friendly funny gentle glad good grand great happy hard heavy high hollow honest hot huge hungry kind large lazy light little
lonely long loud lovely lucky mild modern narrow neat new nice noisy old patient perfect plain polite poor pretty proud quick
quiet rare ready rich ripe rough round sad safe salty secret shallow sharp short shy silent silly simple slow small smart smooth
soft sour spicy steep strange strong sudden sunny sweet tall tame tasty thick thin tidy tiny tired true ugly warm weak wet wide
wild wise wonderful young""".split()

OTHER = """above across afternoon again air always among answer arm back because before behind below beside between birthday
blood body bone breakfast bubble business calendar chance circle class colour corner country crowd dinner direction dollar dozen
edge enemy energy enough evening example exercise eye face fact family finger flight floor foot forever front future game gift
goal gold group half hand head health heart history holiday home hour hundred idea inside island job joke journey joy kingdom
knee language leg lesson level line luck lunch machine magic matter meal member memory message middle minute moment money month
morning mouth music name nation neck never news noise nose nothing number often outside page pair part party past pattern peace
people person place point power present price prize problem question reason record result rule season second secret sentence
service shape side simple size skin song sound space speed sport square step story subject success supper surprise team temple
thing thousand time today toe together tomorrow tongue tooth travel treasure trip trouble truth value voice week weekend weight
winner wish without word world year yesterday""".split()

NAMES = """Ada Alex Amir Anna Ben Carl Clara David Ella Emma Eva Finn George Hana Henry Ida Ivan Jack James Jane John Julia
Kate Leo Lily Lucas Lucy Maria Max Mia Mila Nina Noah Olga Oscar Paul Peter Rosa Ruth Sam Sara Simon Sofia Tim Tom Vera Will
Yuki Zoe""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty""".split()

# animal: (the sound it makes, where it lives, legs)
ANIMAL_FACTS = {
    "dog": ("woof", "in a house with people", 4), "cat": ("meow", "in a house with people", 4),
    "cow": ("moo", "on a farm", 4), "sheep": ("baa", "on a farm", 4), "pig": ("oink", "on a farm", 4),
    "duck": ("quack", "near a pond", 2), "horse": ("neigh", "on a farm", 4), "lion": ("roar", "on the warm plains", 4),
    "frog": ("croak", "near a pond", 4), "bee": ("buzz", "in a hive", 6), "owl": ("hoot", "in the forest", 2),
    "snake": ("hiss", "in the grass", 0), "crow": ("caw", "in tall trees", 2), "mouse": ("squeak", "in a small hole", 4),
    "wolf": ("howl", "in the forest", 4), "hen": ("cluck", "on a farm", 2), "bear": ("growl", "in the forest", 4),
    "goat": ("bleat", "on a farm", 4), "bird": ("tweet", "in a nest", 2), "elephant": ("trumpet", "on the warm plains", 4),
}

COLOUR_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a banana": "yellow", "a tomato": "red",
    "an orange": "orange", "coal": "black", "milk": "white", "a carrot": "orange", "a frog": "green", "chocolate": "brown",
    "a lemon": "yellow", "a strawberry": "red", "the night": "black", "a cloud": "white", "a plum": "purple",
    "a leaf": "green", "a flamingo": "pink", "the sea": "blue", "an elephant": "grey", "a cherry": "red", "salt": "white",
}

OPPOSITES = [pair.split("/") for pair in """hot/cold big/small fast/slow happy/sad old/young day/night up/down left/right
light/dark hard/soft wet/dry full/empty early/late open/closed high/low long/short loud/quiet clean/dirty rich/poor strong/weak
near/far thick/thin good/bad easy/difficult first/last sweet/sour true/false inside/outside love/hate win/lose buy/sell
start/stop always/never black/white tall/short""".split()]

PLURALS = [pair.split("/") for pair in """cat/cats dog/dogs box/boxes baby/babies child/children foot/feet tooth/teeth
mouse/mice man/men woman/women leaf/leaves knife/knives bus/buses city/cities sheep/sheep fish/fish goose/geese house/houses
dish/dishes story/stories wolf/wolves car/cars tree/trees berry/berries potato/potatoes glass/glasses""".split()]

PAST = [pair.split("/") for pair in """go/went eat/ate run/ran see/saw make/made take/took give/gave come/came find/found
sing/sang swim/swam write/wrote read/read buy/bought think/thought sleep/slept walk/walked play/played jump/jumped know/knew
fly/flew drink/drank speak/spoke drive/drove fall/fell""".split()]


def held_out(key: str, one_in: int = 8) -> bool:
    """Whether a word, pair or phrase is kept from training in its task; decided by its text alone."""
    return crc32(("nano/" + key).encode()) % one_in == 0


ALL = sorted({w for group in (ANIMALS, COLOURS, FOODS, DRINKS, THINGS, PLACES, NATURE, PEOPLE, VERBS, ADJECTIVES, OTHER)
              for w in group})
TRAIN = [w for w in ALL if not held_out(w)]
HELD_OUT = [w for w in ALL if held_out(w)]
